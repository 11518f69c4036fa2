"""Calls as bare JSON at the start of the turn.

| format | models | calls |
|---|---|---|
| llama3_json | Llama 3.1 to 3.3, some of Llama-4 | `{"name": ..., "parameters": {...}}` |
| json_list | xLAM | `[{"name": ..., "arguments": {...}}, ...]` |

Llama writes one object, or several with `;` or blanks between them, and may write `<|python_tag|>`
before them, at any place. `parameters` and `arguments` are both read.

What opens a call, without the token: the turn starts (behind blanks and thoughts) with a JSON
object that has arguments or the name of an offered tool. Other JSON, such as `{"answer": 4}`, is an
answer. JSON that cannot be read opens a call if its first key is `name`, `function`, `parameters`
or `arguments`, or it starts with `{"type": "function"`. JSON behind other text is text.

| malformed | the model is told |
|---|---|
| JSON that cannot be read; it covers the rest of the turn | what is wrong, at which character |
| no name, arguments that are no object, another key for them | which |
| `<|python_tag|>` without an object, such as code | that a call must be an object |
| a list without `]` | that it is missing |
"""

from __future__ import annotations

import re
from functools import partial

from conversations.formats.bare import read_bare, start_of_answer
from conversations.formats.blocks import THINK, Call, opening, read_turn, skip_space
from conversations.formats.call_list import BlockRun, CallList, UnreadableError, json_call
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.json_values import CallObject, InvalidJsonError, JsonReader
from conversations.messages import ParsedTurn

PYTHON_TAG = "<|python_tag|>"

_TAG = re.compile(re.escape(PYTHON_TAG))
_OPENS = opening(THINK, re.escape(PYTHON_TAG))
_KEYS = r'\{\s*"(?:name|function|parameters|arguments|type"\s*:\s*"function)"'
_FIRST_KEY = re.compile(_KEYS)
_SEPARATOR = re.compile(r"\s*(?:;\s*)?(?=\{)")
_LLAMA = CallObject(
    'write {"name": ..., "parameters": {...}} and nothing before it',
    arguments=("parameters", "arguments"),
    id="id",
)
_LISTED = CallObject(
    'write [{"name": ..., "arguments": {...}}] and nothing before it',
    arguments=("arguments", "parameters"),
    id="id",
)
_LIST = CallList(_LISTED.hint, re.compile(r"(?!)"))


def parse_llama(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of a turn of Llama."""
    start = start_of_answer(raw, in_think)
    if _opens(raw, start, _LLAMA, types):
        calls: list[Call] = []
        end = _objects(raw, start, start, calls)
        rest = parse_tagged(raw[end:])
        return ParsedTurn(raw[:start] + rest.content, (*calls, *rest.calls))
    return parse_tagged(raw, in_think)


def parse_tagged(raw: str, in_think: bool = False) -> ParsedTurn:
    """The calls behind `<|python_tag|>`."""
    if not in_think and PYTHON_TAG not in raw:
        return ParsedTurn(raw)

    def block(start: int, calls: list[Call]) -> int:
        return _objects(raw, start, skip_space(raw, start + len(PYTHON_TAG)), calls)

    return read_turn(raw, _OPENS, THINK, in_think, block)


def parse_list(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of a turn that may start with a JSON list of calls."""
    start = start_of_answer(raw, in_think)
    first = skip_space(raw, start + 1)
    if not raw.startswith("[", start) or not _opens(raw, first, _LISTED, types):
        return ParsedTurn(raw)
    reader = JsonReader(raw, first, _LIST.tags)
    element = partial(json_call, reader, raw, _LISTED.read)
    return read_bare(raw, start, lambda calls: _LIST.read(raw, start, start, calls, element))


def _opens(text: str, position: int, keys: CallObject, types: ParameterTypes) -> bool:
    """Whether the object at a position is meant as a call."""
    if not text.startswith("{", position):
        return False
    try:
        value, _ = JsonReader(text, position, _TAG).value(position)
    except InvalidJsonError:
        return _FIRST_KEY.match(text, position) is not None
    return keys.is_meant(value, types.by_tool)


def _objects(text: str, start: int, body: int, calls: list[Call]) -> int:
    """Reads the objects that follow each other at `body`; returns where the text goes on."""
    run = BlockRun(text, start, calls, _LLAMA.hint)
    reader = JsonReader(text, body, _TAG)
    position = body
    try:
        while True:
            call, end = json_call(reader, text, _LLAMA.read, position)
            run.add(call, end)
            if (separator := _SEPARATOR.match(text, end)) is None:
                return end
            position = separator.end()
    except UnreadableError as error:
        next_tag = _TAG.search(text, max(body, run.end))
        end = next_tag.start() if next_tag else len(text)
        run.add_unreadable(error, end)
        return end


LLAMA3_JSON = CallFormat("llama3_json", parse_llama, aliases=("llama3", "llama4_json"))
JSON_LIST = CallFormat("json_list", parse_list, aliases=("xlam",))
