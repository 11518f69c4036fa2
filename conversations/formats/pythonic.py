"""Calls as Python writes them: `[f(x=1, y="a"), g()]`.

| format | models | a list of calls stands |
|---|---|---|
| lfm2 | LFM2, LFM2.5 | anywhere, in `<|tool_call_start|>...<|tool_call_end|>` |
| llama4_pythonic | Llama-4 and 3.2, Gemma-3, ToolACE | at the start of the turn, without tokens |

Nothing is evaluated: a value is a literal (`literals.PYTHON`). `true`, `false` and `null` are read
beside Python's names, because templates write objects as JSON. A string may hold raw newlines.

Without tokens a call opens where the turn starts with `[NAME(` and either `argument=` or `)`
follows or the tool is offered. Another list, and a list behind other text, is text.

| malformed | the model is told |
|---|---|
| an argument without a name | arguments must be named |
| a variable, an inner call, an unescaped quote | which value, what was expected there |
| an argument that is given twice | which one |
| no `]` or no closing token | that it is missing |
| a token without a list | that calls must stand in a list |
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from conversations.formats.bare import read_bare, start_of_answer
from conversations.formats.blocks import THINK, Call, opening, read_turn, skip_space
from conversations.formats.call_list import CallList, UnreadableError
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import checked_call
from conversations.formats.literals import PYTHON, LiteralError
from conversations.messages import ParsedTurn

OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"

_WORD = r"([^\s=()\[\]{},'\"]{1,200})"
_CALL = re.compile(rf"{_WORD}\s*\(")
_ARGUMENT = re.compile(rf"{_WORD}\s*=(?!=)")
_START = re.compile(rf"\[\s*{_WORD}\((?P<sure>\s*(?:\)|{_WORD}\s*=))?")
_SHAPE = "[NAME(argument=value, ...)]"

_TAGGED = CallList(
    f"write {OPEN}{_SHAPE}{CLOSE}", re.compile(f"{re.escape(OPEN)}|{re.escape(CLOSE)}"), CLOSE
)
_OPENS = opening(THINK, re.escape(OPEN))
_BARE = CallList(f"write {_SHAPE} and nothing before it", re.compile(r"(?!)"))


def parse_lfm2(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of a turn with tokens around its calls."""
    if not in_think and OPEN not in raw:
        return ParsedTurn(raw)

    def block(start: int, calls: list[Call]) -> int:
        element = partial(_read_call, raw, _TAGGED.hint)
        return _TAGGED.read(raw, start, start + len(OPEN), calls, element)

    return read_turn(raw, _OPENS, THINK, in_think, block)


def parse_bare(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of a turn that may start with a list of calls."""
    start = start_of_answer(raw, in_think)
    opens = _START.match(raw, start)
    if opens is None or not (opens["sure"] or opens[1] in types.by_tool):
        return ParsedTurn(raw)
    element = partial(_read_call, raw, _BARE.hint)
    return read_bare(raw, start, lambda calls: _BARE.read(raw, start, start, calls, element))


def _read_call(text: str, hint: str, position: int) -> tuple[Call, int]:
    """The call at a position, and where it ends. Raises UnreadableError."""
    if (name := _CALL.match(text, position)) is None:
        raise UnreadableError("a call must be written NAME(argument=value, ...)")
    arguments: dict[str, Any] = {}
    end = skip_space(text, name.end())
    try:
        while not text.startswith(")", end):
            end = _read_argument(text, end, arguments)
    except ValueError as error:
        raise UnreadableError(str(error), name=name[1]) from error
    end += 1
    return checked_call(name[1], arguments, text[position:end], hint), end


def _read_argument(text: str, position: int, arguments: dict[str, Any]) -> int:
    """Reads `argument=value` and a comma behind it. Raises ValueError."""
    if (argument := _ARGUMENT.match(text, position)) is None:
        raise ValueError("arguments must be named: argument=value")
    if argument[1] in arguments:
        raise ValueError(f"the argument {argument[1]} is given twice")
    try:
        value, end = PYTHON.read_at(text, skip_space(text, argument.end()))
    except LiteralError as error:
        place = f"character {error.position - position} of the argument"
        reason = f"the value of {argument[1]} is not a literal: {error} at {place}"
        raise ValueError(reason) from error
    arguments[argument[1]] = value
    end = skip_space(text, end)
    if text.startswith(",", end):
        return skip_space(text, end + 1)
    if not text.startswith(")", end):
        raise ValueError(f"the value of {argument[1]} must be followed by , or )")
    return end


LFM2 = CallFormat("lfm2", parse_lfm2, taught_by=("<|tool_list_start|>",), is_typed=False)
LLAMA4_PYTHONIC = CallFormat(
    "llama4_pythonic", parse_bare, aliases=("pythonic", "llama4", "toolace")
)
