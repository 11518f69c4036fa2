"""Hermes tool calls in an assistant turn's text: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`.

Nothing a model writes raises here, and nothing vanishes: what opens a call and is not one becomes a
`MalformedToolCall` with its verbatim text and a reason the model can act on. Linear time on any
input.

Choices, where parsers of the field disagree:
- A `</tool_call>` inside a JSON string belongs to the string: the JSON decides where a call ends,
  not a text search.
- A good call stays good beside a bad one; each block stands for itself, in order.
- A block without its `</tool_call>` is malformed, even at the very end: what was not finished is
  never run.
- `arguments` given as a string that holds a JSON object is that object (some models encode twice);
  no `arguments` at all, and no other key in its place, is `{}`. Other keys beside `name` and
  `arguments` are ignored.
- JSON is strict: no NaN or Infinity, no raw newline inside a string, no number or nesting that
  Python cannot hold.
- Calls inside `<think> ... </think>` are thoughts, not calls; an unclosed `<think>` covers the rest
  of the turn.
- `content` is the text with the call blocks cut out, nothing stripped.
"""

from __future__ import annotations

import re

from conversations.formats.format import NO_TYPES, CallFormat, ParameterTypes
from conversations.formats.json_values import (
    CallObject,
    InvalidJsonError,
    JsonReader,
    written_name,
)
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_SPACE = " \t\r\n"
_OPENING = re.compile(f"{OPEN}|{THINK_OPEN}")
_TAG = re.compile(f"{OPEN}|{CLOSE}")
_HINT = f'write {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}'
_OBJECT = CallObject(_HINT)


def parse(raw: str, types: ParameterTypes = NO_TYPES, *, in_think: bool = False) -> ParsedTurn:
    """The calls and the remaining content of one assistant turn.

    `in_think` says that the generation prompt already opened a `<think>` block.
    """
    if not in_think and OPEN not in raw:
        return ParsedTurn(raw)
    return _Scan(raw).run(in_think)


class _Scan:
    """One pass over the text; `_closing` remembers the next `</tool_call>` so that none is searched
    for twice.
    """

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
            value, end = JsonReader(self.text, body, _TAG).value(body)
        except InvalidJsonError as error:
            return self._malformed(start, body, str(error))
        closing = _skip_space(self.text, end)
        if self.text.startswith(CLOSE, closing):
            after = closing + len(CLOSE)
            self.calls.append(_OBJECT.read(value, self.text[start:after]))
            return after
        reason = f"the JSON object is not followed by {CLOSE}"
        return self._malformed(start, end, reason, name=_OBJECT.name_of(value))

    def _malformed(self, start: int, position: int, reason: str, name: str | None = None) -> int:
        """Ends a bad block at the next closing tag, or before the next opening one, whichever comes
        first.
        """
        closing, opening = self._next_close(position), self.text.find(OPEN, position)
        closed = closing >= 0 and not 0 <= opening < closing
        end = closing + len(CLOSE) if closed else (opening if opening >= 0 else len(self.text))
        block = self.text[start:end]
        if not closed:
            reason = f"{reason}; {CLOSE} is missing" if "followed by" not in reason else reason
        self.calls.append(
            MalformedToolCall(block, f"{reason}; {_HINT}", name or written_name(block))
        )
        return end

    def _next_close(self, position: int) -> int:
        if self._closing != -1 and self._closing < position:
            self._closing = self.text.find(CLOSE, position)
        return self._closing


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


FORMAT = CallFormat(
    "hermes",
    parse,
    aliases=("qwen", "qwen25", "qwen2_5"),
    taught_by=("<tool_call>", "</tool_call>", "arguments"),
    is_typed=False,
)
