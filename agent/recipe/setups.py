"""What a training conversation is told about its tools: names, descriptions, order, system prompt.

About half of the conversations see exactly the tools that ship (`tool_configs/gsm8k.yaml`), in
either order. The others see the same two tools under other names and words, and sometimes tools
that are of no use here, so that the model reads its tools instead of remembering them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

CODE_TOOL, ANSWER_TOOL = "code_interpreter", "calculate_answer"


@dataclass(frozen=True, slots=True)
class ToolSetup:
    """The tools offered, in order, and which of them runs code and which takes the answer, by name
    and argument.
    """

    system: str | None
    tools: tuple[dict[str, Any], ...]
    code_name: str
    code_argument: str
    answer_name: str
    answer_argument: str
    graded: bool
    """True if the answer tool tells what the answer is worth, as the shipped one does."""
    shipped: bool


def shipped_tools(config: Path) -> list[dict[str, Any]]:
    """The OpenAI schemas of a tools.yaml, as written there.

    `code_interpreter` and `calculate_answer`, in its order.
    """
    loaded = yaml.safe_load(config.read_text(encoding="utf-8"))
    entries = loaded["tools"] if isinstance(loaded, dict) else loaded
    schemas = [entry["tool_schema"] for entry in entries]
    names = {schema["function"]["name"] for schema in schemas}
    if names != {CODE_TOOL, ANSWER_TOOL}:
        raise ValueError(
            f"{config} must define exactly the tools {CODE_TOOL} and {ANSWER_TOOL}, got "
            f"{', '.join(sorted(names))}"
        )
    return schemas


def draw(shipped: Sequence[dict[str, Any]], rng: Random, shipped_share: float = 0.5) -> ToolSetup:
    """A random set-up: the shipped tools in a random order, or other ones."""
    if rng.random() < shipped_share:
        return shipped_setup(shipped, reverse=rng.random() < 0.5)
    return _other(shipped, rng)


def shipped_setup(shipped: Sequence[dict[str, Any]], *, reverse: bool) -> ToolSetup:
    """The shipped tools, in the file's order or reversed, without a system prompt."""
    tools = tuple(reversed(shipped)) if reverse else tuple(shipped)
    return ToolSetup(
        None,
        tools,
        CODE_TOOL,
        _argument(shipped, CODE_TOOL),
        ANSWER_TOOL,
        _argument(shipped, ANSWER_TOOL),
        True,
        True,
    )


def _argument(shipped: Sequence[dict[str, Any]], name: str) -> str:
    function = next(schema["function"] for schema in shipped if schema["function"]["name"] == name)
    return str(next(iter(function["parameters"]["properties"])))


def _other(shipped: Sequence[dict[str, Any]], rng: Random) -> ToolSetup:
    by_name = {schema["function"]["name"]: schema for schema in shipped}
    code_name = _draw_name(rng, _CODE_NAMES, _CODE_VERBS, _CODE_NOUNS)
    answer_name = _draw_name(rng, _ANSWER_NAMES, _ANSWER_VERBS, _ANSWER_NOUNS)
    code_argument = rng.choices(
        ("code", "source", "script", "program", "python_code"), (12, 1, 1, 1, 1)
    )[0]
    answer_argument = rng.choices(("answer", "result", "value", "final_answer"), (12, 1, 1, 1))[0]
    code = _reworded(
        by_name[CODE_TOOL], code_name, code_argument, rng, _CODE_WORDS, _CODE_ARGUMENT_WORDS
    )
    answer = _reworded(
        by_name[ANSWER_TOOL],
        answer_name,
        answer_argument,
        rng,
        _ANSWER_WORDS,
        _ANSWER_ARGUMENT_WORDS,
    )
    extra = rng.choices((0, 1, 2), (6, 3, 1))[0]
    tools = [code, answer, *rng.sample(_DISTRACTORS, extra)]
    rng.shuffle(tools)
    system = rng.choice(_SYSTEMS) if rng.random() < 0.5 else None
    return ToolSetup(
        system,
        tuple(tools),
        code_name,
        code_argument,
        answer_name,
        answer_argument,
        rng.random() < 0.7,
        False,
    )


def _draw_name(
    rng: Random, names: Sequence[str], verbs: Sequence[str], nouns: Sequence[str]
) -> str:
    name = rng.choice(names) if rng.random() < 0.5 else f"{rng.choice(verbs)}_{rng.choice(nouns)}"
    return name if rng.random() < 0.95 else "".join(part.capitalize() for part in name.split("_"))


def _reworded(
    schema: dict[str, Any],
    name: str,
    argument: str,
    rng: Random,
    words: Sequence[str],
    argument_words: Sequence[str],
) -> dict[str, Any]:
    schema = copy.deepcopy(schema)
    function = schema["function"]
    function["name"] = name
    if rng.random() < 0.8:
        function["description"] = rng.choice(words)
    described = next(iter(function["parameters"]["properties"].values()))
    if rng.random() < 0.7:
        described["description"] = rng.choice(argument_words)
    elif rng.random() < 0.2:
        described.pop("description", None)
    function["parameters"]["properties"] = {argument: described}
    if "required" in function["parameters"]:
        function["parameters"]["required"] = [argument]
    return schema


def _tool(name: str, description: str, **properties: tuple[str, str]) -> dict[str, Any]:
    described = {
        key: {"type": kind, "description": text} for key, (kind, text) in properties.items()
    }
    parameters = {"type": "object", "properties": described, "required": list(described)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


_CODE_NAMES = (
    "code_interpreter",
    "python",
    "run_code",
    "execute_python",
    "run_python",
    "python_interpreter",
    "ipython",
    "python_repl",
    "interpreter",
)
_CODE_VERBS = (
    "run",
    "execute",
    "exec",
    "eval",
    "evaluate",
    "interpret",
    "compute",
    "do",
    "launch",
    "start",
    "try",
    "call",
)
_CODE_NOUNS = (
    "code",
    "python",
    "script",
    "program",
    "snippet",
    "python_code",
    "source",
    "cell",
    "py",
    "sandbox",
    "math",
)
_ANSWER_NAMES = (
    "calculate_answer",
    "calc_gsm8k_reward",
    "submit_answer",
    "final_answer",
    "answer",
    "check_answer",
    "grade_answer",
    "submit",
    "finish",
)
_ANSWER_VERBS = (
    "submit",
    "check",
    "grade",
    "report",
    "verify",
    "record",
    "send",
    "calc",
    "give",
    "score",
    "post",
    "deliver",
    "judge",
)
_ANSWER_NOUNS = (
    "answer",
    "result",
    "solution",
    "final_answer",
    "reward",
    "gsm8k_answer",
    "response",
    "final",
    "value",
    "score",
    "math_answer",
)
_CODE_WORDS = (
    "Run Python code and return what it prints.",
    "A tool for executing code.",
    "Executes a Python program in a sandbox. Returns stdout and stderr.",
    "Python interpreter. Use print() to see results.",
    "Runs a script and returns its output.",
    "Evaluate Python source code; the output is whatever the code prints.",
    "Execute the given Python 3 code in an isolated environment and return its standard output.",
    "Use this to do arithmetic exactly: write a small Python program that prints the result.",
    "code runner",
)
_CODE_ARGUMENT_WORDS = (
    "The Python code to run.",
    "The code to execute.",
    "Python source. Print the result.",
    "A complete Python program.",
    "code",
    "Python 3 source code, executed as a script",
)
_ANSWER_WORDS = (
    "Submit the final answer.",
    "A tool for calculating the reward of gsm8k. (1.0 if parsed answer is correct, 0.0 if parsed "
    "answer is incorrect or not "
    "correctly parsed)",
    "Check the answer to the problem and get a reward.",
    "Give your answer to the question here once you know it.",
    "Grades the model's answer.",
    "Report the number you found.",
    "Records the final result of the calculation.",
    "Hands in the answer; returns whether it is right.",
)
_ANSWER_ARGUMENT_WORDS = (
    "The answer.",
    "The model's answer to the GSM8K math problem, must be a digits",
    "The final number.",
    "Your answer, digits only.",
    "The numeric result, without units.",
    "answer",
)
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful math tutor.",
    "Solve the problem with the tools.",
    "You solve math word problems. Use the tools you are given.",
    "You are an expert at solving math problems. Compute with code, then submit the answer.",
    "Answer the question. First run code, then hand in the result.",
    "You are an AI agent with access to tools. Call one tool at a time.",
    "You are a math expert. You are given a question and you need to solve it step by step. "
    "Reasoning step by step before any "
    "tool call. You should use the `calc_gsm8k_reward` tool after step by step solving the "
    "question, before generate final answer "
    "at least once and refine your answer if necessary. Put your final answer in the format of "
    "`#### <answer>`.",
    "Be brief.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Think with code. Never guess a number.",
)
_DISTRACTORS = (
    _tool(
        "search",
        "Searches documents and returns the best matches.",
        query=("string", "What to search for."),
    ),
    _tool(
        "get_weather",
        "The weather in a city.",
        city=("string", "Name of the city."),
        unit=("string", "celsius or fahrenheit"),
    ),
    _tool("read_file", "Reads a text file.", path=("string", "Path of the file.")),
    _tool(
        "send_email",
        "Sends an email.",
        to=("string", "Address."),
        subject=("string", "Subject line."),
        body=("string", "Text."),
    ),
    _tool(
        "get_time",
        "Returns the current time in a time zone.",
        timezone=("string", "IANA name of the time zone."),
    ),
    _tool(
        "translate",
        "Translates a text.",
        text=("string", "Text to translate."),
        language=("string", "Target language."),
    ),
    _tool(
        "web_search", "Search the web.", query_list=("string", "Queries, separated by newlines.")
    ),
    _tool(
        "create_note",
        "Saves a note for later.",
        title=("string", "Title."),
        text=("string", "Content."),
    ),
    _tool(
        "convert_currency",
        "Converts an amount of money.",
        amount=("number", "Amount."),
        source=("string", "From."),
        target=("string", "To."),
    ),
)
