"""Calls as `call:NAME{key:value,...}` between two tokens, strings between a token of their own.

Nothing escapes a string. It ends at the first quote token that a comma or a closing bracket
follows; other quote tokens belong to it. A token that opens a string ends the search: what stands
before it was not closed. Values are numbers, `true`, `false`, `null` (or `None`, as the template
prints it), lists and objects with bare keys. No value needs the tool's schema.

| malformed | the model is told (and an example of a call) |
|---|---|
| no `call:NAME{` behind the opening token | expected call:NAME{, got ... |
| a string without its quote token | a string is not closed: QUOTE is missing |
| anything else that is no value, no key, no comma | expected ..., got ... |
| a key given twice, nested more than 64 deep | that |
| a call without its closing token | expected CLOSE, got ... |

A malformed call ends at the next closing token, else before the next call, from where it went
wrong. Linear time: quote tokens are looked up in one list a turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from conversations.formats.blocks import (
    SPACE,
    Call,
    Thought,
    excerpt,
    one_of,
    opening,
    read_turn,
    skip_space,
)
from conversations.formats.format import CallFormat, ParameterTypes
from conversations.formats.literals import LiteralError, Literals
from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall

_BEFORE_STRING = (":", ",", "[", "{")
_BEHIND_STRING = re.compile(r"[ \t\r\n]*[,}\]:]")
_KEY = re.compile(r"""[^\s:,{}\[\]<>"'][^:,{}\[\]<>\n]*""")


@dataclass(frozen=True, slots=True)
class BraceTokens:
    """The tokens of one format."""

    open: str
    close: str
    quote: str
    thought: Thought

    @property
    def example(self) -> str:
        return f"{self.open}call:NAME{{key:{self.quote}text{self.quote},other:1}}{self.close}"


def braces_format(name: str, tokens: BraceTokens, aliases: tuple[str, ...] = ()) -> CallFormat:
    """The call format of these tokens."""
    opens = opening(tokens.thought, re.escape(tokens.open))
    patterns = _Patterns(tokens)

    def parse(raw: str, types: ParameterTypes, *, in_think: bool = False) -> ParsedTurn:
        return read_turn(raw, opens, tokens.thought, in_think, _Turn(tokens, patterns, raw).block)

    return CallFormat(name, parse, aliases, is_typed=False, thought=tokens.thought)


class _Patterns:
    def __init__(self, tokens: BraceTokens) -> None:
        open_, close = re.escape(tokens.open), re.escape(tokens.close)
        self.call = re.compile(r"call:([^\s{}<>]+)(?={)")
        self.resume = re.compile(one_of(open_, close=close))


class _Turn:
    """Reads the calls of one turn."""

    def __init__(self, tokens: BraceTokens, patterns: _Patterns, text: str) -> None:
        self.tokens, self.patterns, self.text = tokens, patterns, text
        self._values = Literals(self._string, _KEY)
        self._quotes: list[tuple[int, bool]] | None = None

    def block(self, start: int, calls: list[Call]) -> int:
        name = None
        try:
            position = skip_space(self.text, start + len(self.tokens.open))
            if (call := self.patterns.call.match(self.text, position)) is None:
                raise LiteralError("expected call:NAME{", position)
            name = call.group(1)
            arguments, position = self._values.read_at(self.text, call.end())
            position = skip_space(self.text, position)
            if not self.text.startswith(self.tokens.close, position):
                raise LiteralError(f"expected {self.tokens.close}", position)
        except LiteralError as error:
            return self._malformed(start, error, name, calls)
        end = position + len(self.tokens.close)
        calls.append(ToolCall(name, arguments, self.text[start:end]))
        return end

    def _malformed(
        self, start: int, error: LiteralError, name: str | None, calls: list[Call]
    ) -> int:
        after = max(error.position, start + len(self.tokens.open))
        found = self.patterns.resume.search(self.text, after)
        end = len(self.text)
        if found is not None:
            end = found.end() if found.group("close") else found.start()
        reason = f"{error}, got {excerpt(self.text, error.position)}; write {self.tokens.example}"
        calls.append(MalformedToolCall(self.text[start:end], reason, name))
        return end

    def _string(self, text: str, position: int) -> tuple[str, int]:
        """The string that opens at a position, and where it ends."""
        quote = self.tokens.quote
        if not text.startswith(quote, position):
            raise LiteralError("expected a value", position)
        start = position + len(quote)
        if self._quotes is None:
            self._quotes = list(self._places())
        place = bisect_left(self._quotes, (start, False))
        if place == len(self._quotes) or not self._quotes[place][1]:
            raise LiteralError(f"a string is not closed: {quote} is missing", start)
        end = self._quotes[place][0]
        return text[start:end], end + len(quote)

    def _places(self) -> Iterator[tuple[int, bool]]:
        """Where the quote tokens are that open or close a string, and whether they close one."""
        quote, place, last = self.tokens.quote, -1, 0
        while (place := self.text.find(quote, place + 1)) >= 0:
            closes = _BEHIND_STRING.match(self.text, place + len(quote)) is not None
            if closes or self.text[last:place].rstrip(SPACE)[-1:] in _BEFORE_STRING:
                yield place, closes
            last = place
