"""First calls that fail, and what the tool really says to them.

A fault is a way to break a good program or the call around it. What the model is told comes from
really running the broken program, or from really parsing the broken call; a fault that turns out to
do no harm is not one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from agent.recipe.programs import run_arithmetic
from agent.recipe.setups import ToolSetup
from conversations.formats.format import NO_TYPES
from conversations.formats.registry import format_named
from conversations.messages import MalformedToolCall


@dataclass(frozen=True, slots=True)
class Fault:
    """A failing turn: the assistant's text, verbatim, and the tool response it gets."""

    text: str
    response: str


HERMES = format_named("hermes")
"""The call format that the embedded model's chat template teaches."""


def call_text(name: str, arguments: dict[str, object]) -> str:
    """One hermes call, as the chat template writes it."""
    body = f'{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'
    return f"<tool_call>\n{body}\n</tool_call>"


def broken_code(code: str, rng: Random) -> tuple[str, str] | None:
    """A program that fails where `code` did not, and its output and traceback.

    None if no try broke it.
    """
    for _ in range(8):
        broken = rng.choice(_BREAKS)(code, rng)
        if broken is None or broken == code:
            continue
        try:
            done = run_arithmetic(broken)
        except ValueError:
            continue
        if done.error is not None:
            return broken, done.stdout + done.error
    return None


def failing_turn(setup: ToolSetup, code: str, rng: Random) -> Fault | None:
    """A turn that fails: mostly broken code, now and then a call that is no call, or not one of
    these tools.
    """
    if rng.random() < 0.8:
        broken = broken_code(code, rng)
        return (
            Fault(call_text(setup.code_name, {setup.code_argument: broken[0]}), broken[1])
            if broken
            else None
        )
    return rng.choice((_malformed, _wrong_argument, _unknown_tool, _silent))(setup, code, rng)


# ------------------------------------------------------------------ ways to break a program


def _typo(code: str, rng: Random) -> str | None:
    """A name used that was never assigned."""
    names = re.findall(r"^(\w{3,}) =", code, re.MULTILINE)
    used = [name for name in names if len(re.findall(rf"\b{name}\b", code)) > 1]
    if not used:
        return None
    name = rng.choice(used)
    wrong = rng.choice((name[:-1], name + "s", name.split("_")[0] + "_total", "total_" + name))
    spots = list(re.finditer(rf"\b{name}\b(?! =)", code))
    spot = rng.choice(spots) if spots else None
    return (
        None if spot is None or wrong == name else code[: spot.start()] + wrong + code[spot.end() :]
    )


def _missing_line(code: str, rng: Random) -> str | None:
    lines = code.split("\n")
    if len(lines) < 3:
        return None
    lines.pop(rng.randrange(len(lines) - 1))
    return "\n".join(lines)


def _print_first(code: str, _: Random) -> str | None:
    *lines, last = code.split("\n")
    return "\n".join([last, *lines])


def _unclosed(code: str, rng: Random) -> str | None:
    closing = [i for i, char in enumerate(code) if char == ")"]
    i = rng.choice(closing)
    return code[:i] + code[i + 1 :]


def _missing_operator(code: str, rng: Random) -> str | None:
    spots = list(re.finditer(r" (?:\+|-|\*|//|/) ", code))
    spot = rng.choice(spots) if spots else None
    return code[: spot.start()] + " " + code[spot.end() :] if spot else None


def _prose(code: str, rng: Random) -> str | None:
    lines = code.split("\n")
    lines.insert(
        rng.randrange(len(lines)),
        rng.choice(
            (
                "Let us compute the answer",
                "First we add them up",
                "Step 1: find the total",
                "so the answer is",
            )
        ),
    )
    return "\n".join(lines)


def _indent(code: str, rng: Random) -> str | None:
    lines = code.split("\n")
    i = rng.randrange(1, len(lines))
    lines[i] = "    " + lines[i]
    return "\n".join(lines)


def _text_number(code: str, rng: Random) -> str | None:
    spots = list(re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", code))
    spot = rng.choice(spots) if spots else None
    return f'{code[: spot.start()]}"{spot.group()}"{code[spot.end() :]}' if spot else None


def _zero_division(code: str, rng: Random) -> str | None:
    spots = list(re.finditer(r"/ \w+", code))
    if not spots:
        return code.replace("print(", "print(1 / 0 * ", 1) if rng.random() < 0.3 else None
    spot = rng.choice(spots)
    return f"{code[: spot.start()]}/ 0{code[spot.end() :]}"


def _unknown_function(code: str, rng: Random) -> str | None:
    return re.sub(
        r"print\((\w+)\)$",
        rf"print({rng.choice(('solve', 'calculate', 'sqrt', 'floor', 'total'))}(\1))",
        code,
    )


def _unit(code: str, rng: Random) -> str | None:
    """A number with its unit, as in the story."""
    spots = list(re.finditer(r"(?<![\w.])\d+(?![\w.])", code))
    spot = rng.choice(spots) if spots else None
    return (
        f"{code[: spot.end()]} "
        f"{rng.choice(('dollars', 'hours', 'percent', 'units'))}{code[spot.end() :]}"
        if spot
        else None
    )


_Break = Callable[[str, Random], str | None]
_BREAKS: tuple[_Break, ...] = (
    _typo, _typo, _typo, _missing_line, _missing_line, _print_first, _unclosed, _unclosed,
    _missing_operator, _prose,
    _indent, _text_number, _zero_division, _unknown_function, _unit,
)  # fmt: skip


# ------------------------------------------------------------------ ways to break a call


def _message(setup: ToolSetup, rng: Random, shipped: str, *others: str) -> str:
    """A message to the model: the runtime's own for the shipped tools, any of them for others."""
    return shipped if setup.shipped else rng.choice((shipped, *others))


def _malformed(setup: ToolSetup, code: str, rng: Random) -> Fault | None:
    good = call_text(setup.code_name, {setup.code_argument: code})
    breaks: tuple[Callable[[str], str], ...] = (
        lambda text: text.replace('"}}\n', '"}\n'),
        lambda text: text.replace("\\n", "\n"),
        lambda text: text.replace('", "arguments"', '", arguments'),
        lambda text: text.replace('"arguments"', '"argument"'),
        lambda text: text.replace("\n</tool_call>", ""),
    )
    text = rng.choice(breaks)(good)
    calls = HERMES.parse(text, NO_TYPES).calls
    if len(calls) != 1 or not isinstance(calls[0], MalformedToolCall):
        return None
    error = calls[0].error
    return Fault(
        text,
        _message(
            setup, rng, f"Error: malformed tool call: {error}", error, f"Invalid tool call: {error}"
        ),
    )


def _wrong_argument(setup: ToolSetup, code: str, rng: Random) -> Fault | None:
    name, argument = setup.code_name, setup.code_argument
    wrong = rng.choice(
        [
            word
            for word in ("code", "python", "script", "input", "text", "expression")
            if word != argument
        ]
    )
    problem = f'arguments: "{argument}" is a required property'
    shipped = f"Error: invalid arguments for {name}: {problem}"
    response = _message(
        setup, rng, shipped, f"Invalid arguments: {problem}", f"missing argument '{argument}'"
    )
    return Fault(call_text(name, {wrong: code}), response)


def _unknown_tool(setup: ToolSetup, code: str, rng: Random) -> Fault | None:
    names = [str(tool["function"]["name"]) for tool in setup.tools]
    wrong = rng.choice(
        [
            word
            for word in ("python", "code_interpreter", "calculator", "run", "compute", "bash")
            if word not in names
        ]
    )
    offered = ", ".join(names)
    shipped = f"Error: there is no tool named {wrong!r}; the tools are: {offered}"
    response = _message(setup, rng, shipped, f"Unknown tool: {wrong}", f"Use one of: {offered}")
    return Fault(call_text(wrong, {setup.code_argument: code}), response)


def _silent(setup: ToolSetup, code: str, rng: Random) -> Fault | None:
    """A program that prints nothing."""
    quiet = code[: code.rindex("\nprint(")]
    response = _message(setup, rng, "The code ran and printed nothing.", "(no output)", "")
    return Fault(call_text(setup.code_name, {setup.code_argument: quiet}), response)
