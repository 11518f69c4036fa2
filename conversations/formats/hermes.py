"""Hermes tool calls in an assistant turn's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Nothing a model writes raises here, and nothing vanishes: what opens a call and is not one becomes a
`MalformedToolCall` with its verbatim text and a reason the model can act on. Linear time on any input.

Choices, where parsers of the field disagree:
- A `</tool_call>` inside a JSON string belongs to the string: the JSON decides where a call ends, not a text search.
- A good call stays good beside a bad one; each block stands for itself, in order.
- A block without its `</tool_call>` is malformed, even at the very end: what was not finished is never run.
- `arguments` given as a string that holds a JSON object is that object (some models encode twice); no `arguments` at
  all, and no other key in its place, is `{}`. Other keys beside `name` and `arguments` are ignored.
- JSON is strict: no NaN or Infinity, no raw newline inside a string, no number or nesting that Python cannot hold.
- Calls inside `<think> ... </think>` are thoughts, not calls; an unclosed `<think>` covers the rest of the turn.
- `content` is the text with the call blocks cut out, nothing stripped.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any, NoReturn

from conversations.formats.format import CallFormat, ParameterTypes
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_MAX_DEPTH = 64
"""Deeper arguments are malformed: what walks them (schema checks, JSON writers) recurses."""

_SPACE = " \t\r\n"
_OPENING = re.compile(f"{OPEN}|{THINK_OPEN}")
_TAG = re.compile(f"{OPEN}|{CLOSE}")
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)
_NAME_VALUE = re.compile(r'\s*:\s*"([^"\\]{1,200})"')
_HINT = f'write {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}'


def parse(raw: str, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of one assistant turn.

    `in_think` says that the generation prompt already opened a `<think>` block.
    """
    if not in_think and OPEN not in raw:
        return ParsedTurn(raw)
    return _Scan(raw).run(in_think)


class _Scan:
    """One pass over the text; `_closing` remembers the next `</tool_call>` so that none is searched for twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.content: list[str] = []
        self.calls: list[ToolCall | MalformedToolCall] = []
        self._closing = -2

    def run(self, in_think: bool) -> ParsedTurn:
        copied = 0
        position = self._after_think(0) if in_think else 0
        while (opening := _OPENING.search(self.text, position)) is not None:
            if opening.group() == THINK_OPEN:
                position = self._after_think(opening.end())
                continue
            self.content.append(self.text[copied : opening.start()])
            copied = position = self._block(opening.start())
        self.content.append(self.text[copied:])
        return ParsedTurn("".join(self.content), tuple(self.calls))

    def _after_think(self, position: int) -> int:
        close = self.text.find(THINK_CLOSE, position)
        return len(self.text) if close < 0 else close + len(THINK_CLOSE)

    def _block(self, start: int) -> int:
        """Reads the block that opens at `start`; returns where the text goes on."""
        body = _skip_space(self.text, start + len(OPEN))
        try:
            value, end = self._decode(body)
        except (ValueError, RecursionError) as error:
            return self._malformed(start, body, _json_error(error))
        closing = _skip_space(self.text, end)
        if self.text.startswith(CLOSE, closing):
            after = closing + len(CLOSE)
            self.calls.append(_call(value, self.text[start:after]))
            return after
        reason = f"the JSON object is not followed by {CLOSE}"
        return self._malformed(start, end, reason, name=_name_of(value))

    def _decode(self, body: int) -> tuple[object, int]:
        """The JSON value at `body` and where it ends.

        Decodes up to the next tag first, and more only while a string is open there: a tag can stand nowhere else in
        JSON, and an error costs the length of what was handed to the decoder.
        """
        end = self._next_tag(body)
        while True:
            try:
                value, length = _DECODER.raw_decode(self.text[body:end])
            except json.JSONDecodeError as error:
                if end == len(self.text) or not _ends_in_string(error):
                    raise
                end = self._next_tag(body + 2 * (end - body) + 1)
            else:
                return value, body + length

    def _next_tag(self, position: int) -> int:
        tag = _TAG.search(self.text, position)
        return tag.start() if tag else len(self.text)

    def _malformed(self, start: int, position: int, reason: str, name: str | None = None) -> int:
        """Ends a bad block at the next closing tag, or before the next opening one, whichever comes first."""
        closing, opening = self._next_close(position), self.text.find(OPEN, position)
        closed = closing >= 0 and not 0 <= opening < closing
        end = closing + len(CLOSE) if closed else (opening if opening >= 0 else len(self.text))
        block = self.text[start:end]
        if not closed:
            reason = f"{reason}; {CLOSE} is missing" if "followed by" not in reason else reason
        self.calls.append(
            MalformedToolCall(block, f"{reason}; {_HINT}", name or _written_name(block))
        )
        return end

    def _next_close(self, position: int) -> int:
        if self._closing != -1 and self._closing < position:
            self._closing = self.text.find(CLOSE, position)
        return self._closing


def _call(value: object, block: str) -> ToolCall | MalformedToolCall:
    name = _name_of(value)
    if not isinstance(value, dict):
        return MalformedToolCall(
            block, f"a call must be a JSON object, not {_kind(value)}; {_HINT}"
        )
    if not name:
        return MalformedToolCall(block, f'"name" must be a non-empty string; {_HINT}')
    if "arguments" not in value and (others := [key for key in value if key != "name"]):
        return MalformedToolCall(
            block,
            f'the key is "arguments", not {", ".join(map(repr, others))[:200]}; {_HINT}',
            name,
        )
    arguments = _arguments(value.get("arguments", {}))
    if not isinstance(arguments, dict):
        return MalformedToolCall(
            block, f'"arguments" must be a JSON object, not {_kind(arguments)}; {_HINT}', name
        )
    if block.count("{") + block.count("[") > _MAX_DEPTH and _depth(arguments) > _MAX_DEPTH:
        return MalformedToolCall(block, f"nested more than {_MAX_DEPTH} deep; {_HINT}", name)
    if "\\u" in block and not _encodable([name, arguments]):
        return MalformedToolCall(block, f"a string holds half of a surrogate pair; {_HINT}", name)
    return ToolCall(name, arguments, block)


def _arguments(value: object) -> object:
    """The arguments, decoded once more where they came as a string."""
    if not isinstance(value, str):
        return value
    try:
        return _DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def _name_of(value: object) -> str | None:
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def _written_name(block: str) -> str | None:
    """The name that a block which is not JSON gives its call: never one that stands deeper in it."""
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(block):
        text = token.group()
        if text in ("{", "["):
            depth += 1
        elif text in ("}", "]"):
            depth -= 1
        elif depth <= 1 and text == '"name"' and (value := _NAME_VALUE.match(block, token.end())):
            return value.group(1)
    return None


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for part in level
            if isinstance(part, (dict, list))
            for item in (part.values() if isinstance(part, dict) else part)
        ]
    return depth


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _ends_in_string(error: json.JSONDecodeError) -> bool:
    """Whether a string was still open where the text ended; a \\uXXXX at the very end is reported as a bad one."""
    return error.msg.startswith("Unterminated string") or (
        error.msg.startswith("Invalid \\u") and error.pos >= len(error.doc) - 5
    )


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg.removesuffix(' at')} at character {error.pos} of the call"
        if error.msg.startswith("Invalid control character"):
            place += r" (inside a string write \n for a newline and \t for a tab)"
        return f"not valid JSON: {place}"
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    if isinstance(error, _NotAValueError):
        return f"not valid JSON: {error}"
    return f"not valid JSON: a number has more than {sys.get_int_max_str_digits()} digits"  # int() refused it


class _NotAValueError(ValueError):
    """Python's decoder reads it, JSON does not have it."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotAValueError(f"the number {text[:40]} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise _NotAValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def _parse_untyped(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
    """`parse`, in the shape that every format has: JSON values need no declared types."""
    return parse(raw, in_think=in_think)


FORMAT = CallFormat(
    "hermes",
    _parse_untyped,
    aliases=("qwen", "qwen25", "qwen2_5"),
    taught_by=("<tool_call>", "</tool_call>", "arguments"),
    is_typed=False,
)
