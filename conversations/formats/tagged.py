"""Calls written in tags, with parameters as text: the grammar that several formats share.

```text
turn       text, thoughts and blocks
block      BLOCK_OPEN call+ BLOCK_CLOSE            several calls only if the format writes them so
call       CALL(name) parameter* CALL_CLOSE
parameter  PARAMETER(key) value PARAMETER_CLOSE
```

Blanks may stand between tags. Nothing escapes a value, so a text can have several readings. The
rules:
- A value ends at the first PARAMETER_CLOSE that another parameter or the end of the call follows:
  `</parameter>` alone, `</tool_call>` or `<tool_call>` inside a value belong to the value.
- A whole call inside a value belongs to the value: its tags are balanced. So an example of a call
  that a model writes into a file is not run. A value that opens a call and does not close it is
  malformed; what it opened is read as the next call.
- A value that opens a parameter and does not close it is a parameter that was not closed. A value
  that closes one it did not open, and goes on in the next line, lost an opening tag. Neither is
  run. `x</parameter>y` and balanced tags, as in an XML file, are values.
- A malformed call ends at its own end tag, else before the next call, else with its block. Its
  neighbors stay good.
- A call outside a block is malformed. A closing tag that closes nothing is content.
- Calls that share a block share its text: the first has the opening tag in its `raw`, the last the
  closing one.

| malformed | the model is told (and an example of a call) |
|---|---|
| no call in a block, other text (JSON) in a block | expected CALL, got ... |
| a call outside a block | BLOCK_OPEN is missing before the call |
| a parameter without its end tag, text behind one | parameter 'x': it is not closed: ... |
| a parameter without its opening tag | parameter 'x': PARAMETER is missing before PARAMETER_CLOSE |
| other text before a parameter | expected PARAMETER or CALL_CLOSE, got ... |
| a call or a block without its end tag | expected CALL_CLOSE or BLOCK_CLOSE, got ... |
| a parameter given twice | parameter 'x' is given twice |
| a value that its schema cannot have | parameter 'x' must be integer; not valid JSON: ... |

Linear time: a value is searched no further than the next call that is not inside it, and tags are
balanced once a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from conversations.formats.blocks import Call, excerpt, read_turn, skip_space
from conversations.formats.format import CallFormat, ParameterTypes, Schema
from conversations.formats.tag_grammar import Grammar, Tags
from conversations.formats.thinking import without_thought
from conversations.formats.values import read_value
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall

_CDATA = "<![CDATA["
_NOT_A_STRING: Schema = {"type": ["integer", "number", "boolean", "null", "array", "object"]}


def tagged_format(name: str, tags: Tags, aliases: tuple[str, ...] = ()) -> CallFormat:
    """The call format of a family of tags."""
    grammar = Grammar(tags)

    def parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        turn = _Turn(grammar, raw, types)
        parsed = read_turn(raw, grammar.opens, tags.thought, in_think, turn.block)
        return _unframed(parsed, grammar, in_think) if tags.frame else parsed

    return CallFormat(name, parse, aliases, thought=tags.thought)


def _unframed(parsed: ParsedTurn, grammar: Grammar, in_think: bool) -> ParsedTurn:
    """The turn without the tokens around its messages; its thought is taken out before them."""
    parsed = without_thought(parsed, grammar.tags.thought, in_think=in_think)
    return replace(parsed, content=grammar.frame.sub("", parsed.content))


class _TagError(Exception):
    """The tags of a call are wrong at a position; what stands before it was read."""

    def __init__(self, reason: str, position: int, name: str | None = None) -> None:
        super().__init__(reason)
        self.position, self.name = position, name


@dataclass(slots=True)
class _Read:
    """A call whose tags are right. `problem` is what is wrong with its parameters."""

    name: str
    end: int
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class _Turn:
    """Reads the blocks of one turn."""

    def __init__(self, grammar: Grammar, text: str, types: ParameterTypes) -> None:
        self.grammar, self.tags, self.text, self.types = grammar, grammar.tags, text, types
        self._ends: dict[int, int] | None = None
        self._quoted_to = -1

    def block(self, start: int, calls: list[Call]) -> int:
        """Reads a block, appends its calls, returns where it ends. The text of a call begins at
        `start`."""
        if not self.text.startswith(self.tags.block[0], start):
            return self._stray(start, calls)
        position, last = start + len(self.tags.block[0]), False
        while not last:
            position = skip_space(self.text, position)
            try:
                read = self._call(position)
                end, last = self._behind(read)
                raw = self.text[start:end]
                calls.append(
                    self._malformed(raw, read.problem, read.name)
                    if read.problem
                    else ToolCall(read.name, read.arguments, raw)
                )
            except _TagError as error:
                end, last = self._resume(start, position, error)
                calls.append(self._malformed(self.text[start:end], str(error), error.name))
            start = position = end
        return end

    def _call(self, position: int) -> _Read:
        """The call that opens at a position, up to and with its own end tag."""
        opened = self.grammar.call.match(self.text, position)
        if opened is None:
            expected = f"{self.tags.call[0]}NAME" if self.tags.call[0] else "a function's name"
            raise self._unexpected(f"{expected} after {self.tags.block[0]}", position)
        read = _Read(opened.group(1), opened.end())
        position = skip_space(self.text, opened.end())
        while (parameter := self.grammar.parameter.match(self.text, position)) is not None:
            position = skip_space(self.text, self._parameter(parameter, read))
        close = self.tags.call_close
        if not self.text.startswith(close, position):
            raise self._unexpected(f"{self.tags.parameter[0]} or {close}", position, read.name)
        read.end = position + len(close)
        return read

    def _parameter(self, parameter: re.Match[str], read: _Read) -> int:
        """Reads a parameter into the call, returns where it ends."""
        key, start = parameter.group(1), parameter.end()
        quoted = self.tags.cdata and self.text.startswith(_CDATA, start)
        end = self._value_end(self._quote_end(start) if quoted else start)
        value = self.text[start : end.start()] if end else ""
        flaw = self.grammar.not_closed if end is None else None
        if quoted and value.endswith("]]>"):
            value = value[len(_CDATA) : -len("]]>")]
        else:
            flaw = flaw or self.grammar.flaw(value)
        if end is None or flaw:
            raise _TagError(f"parameter {key!r}: {flaw}", start, read.name)
        if key in read.arguments:
            read.problem = read.problem or f"parameter {key!r} is given twice"
            return end.end()
        if self.tags.newlines:
            value = value.removeprefix("\n").removesuffix("\n")
        says = parameter.group(2) if parameter.re.groups > 1 else None
        try:
            read.arguments[key] = self._value(value, read.name, key, says)
        except ValueError as error:
            read.arguments[key] = value
            read.problem = read.problem or f"parameter {key!r} {error}"
        return end.end()

    def _value(self, value: str, name: str, key: str, is_string: str | None) -> Any:
        if is_string == self.tags.string_mark:
            return value
        return read_value(value, _NOT_A_STRING if is_string else self.types.schema(name, key))

    def _quote_end(self, start: int) -> int:
        """The last character of a value in CDATA; the end of the text if nothing closes it."""
        if self._quoted_to < start:
            place = self.text.find("]]>", start)
            self._quoted_to = len(self.text) if place < 0 else place
        return self._quoted_to

    def _value_end(self, position: int) -> re.Match[str] | None:
        """The tag that ends the value at a position: see the module's rules."""
        closed = False
        while (tag := self.grammar.in_value.search(self.text, position)) is not None:
            if tag.lastgroup == "value_end":
                return tag
            position = tag.end()
            if tag.lastgroup == "end":
                closed = True
                continue
            inside = None if closed else self._end_of_call(tag.start())
            if inside is None:
                return None
            position = inside
        return None

    def _behind(self, read: _Read) -> tuple[int, bool]:
        """Where the text of a call ends, and whether its block ends with it."""
        position = skip_space(self.text, read.end)
        if self.text.startswith(self.tags.block[1], position):
            return position + len(self.tags.block[1]), True
        follows = self.grammar.resume.search(self.text, position) if self.tags.several else None
        if follows is None or follows.lastgroup == "block":
            raise self._unexpected(self.tags.block[1], position, read.name)
        return read.end, False

    def _resume(self, start: int, position: int, error: _TagError) -> tuple[int, bool]:
        """Where a malformed call ends, and whether its block ends with it."""
        end = self._end_of_call(position if self.tags.several else start)
        if end is None:
            return self._next(error.position)
        behind = skip_space(self.text, end)
        if self.tags.several and self.text.startswith(self.tags.block[1], behind):
            return behind + len(self.tags.block[1]), True
        return end, not self.tags.several or self._is_over(behind)

    def _next(self, position: int) -> tuple[int, bool]:
        """The same for a call that nothing closes."""
        found = self.grammar.resume.search(self.text, position)
        if found is None:
            return len(self.text), True
        if found.lastgroup == "done":
            return found.end(), True
        return found.start(), not self.tags.several or found.lastgroup == "block"

    def _is_over(self, position: int) -> bool:
        """Whether nothing of this block can follow."""
        return position == len(self.text) or self.text.startswith(self.tags.block[0], position)

    def _stray(self, start: int, calls: list[Call]) -> int:
        """A call without a block around it."""
        found = self.grammar.stray_end.search(self.text, start + 1)
        end = len(self.text)
        if found is not None:
            end = found.end() if found.lastgroup == "done" else found.start()
        opened = self.grammar.call.match(self.text, start) if self.tags.call[0] else None
        reason = f"{self.tags.block[0]} is missing before the call"
        name = opened.group(1) if opened else None
        calls.append(self._malformed(self.text[start:end], reason, name))
        return end

    def _end_of_call(self, start: int) -> int | None:
        """Where the call ends that opens at `start`, by the balance of tags; None if nothing closes
        it."""
        if self._ends is None:
            self._ends = dict(_balanced(self.grammar.balance, self.text))
        return self._ends.get(start)

    def _unexpected(self, expected: str, position: int, name: str | None = None) -> _TagError:
        return _TagError(f"expected {expected}, got {excerpt(self.text, position)}", position, name)

    def _malformed(self, raw: str, reason: str, name: str | None) -> MalformedToolCall:
        return MalformedToolCall(raw, f"{reason}; write {self.tags.example}", name)


def _balanced(balance: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """The start and the end of each call whose tags are balanced."""
    opened: list[int] = []
    for tag in balance.finditer(text):
        if tag.lastgroup == "call":
            opened.append(tag.start())
        elif opened:
            yield opened.pop(), tag.end()
