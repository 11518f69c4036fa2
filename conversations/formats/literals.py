"""Values that are not JSON: what Python prints, and strings in a format's own quotes.

As strict as JSON is in `json_values.py`, on top of which this stands: a value that a record cannot
hold is refused. Everything here raises LiteralError with a reason, and nothing else. Linear time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conversations.formats.json_values import MAX_DEPTH, unstorable

ReadString = Callable[[str, int], tuple[str, int]]
"""Reads the string that opens at a position of a text, returns it and where it ends."""


class LiteralError(ValueError):
    """The text is no value from `position` on. The message is the reason for the model."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


@dataclass(frozen=True, slots=True)
class Literals:
    """A grammar of values: numbers, JSON's and Python's words, lists, objects, strings.

    `bare_key` finds a key without quotes; without it keys are strings.
    """

    string: ReadString
    bare_key: re.Pattern[str] | None = None

    def read(self, text: str) -> Any:
        """The value that is the whole text, blanks around it aside."""
        value, end = self.read_at(text, _space(text, 0))
        if _space(text, end) < len(text):
            raise LiteralError("expected nothing after the value", end)
        if (reason := unstorable(value, text)) is not None:
            raise LiteralError(reason, 0)
        return value

    def read_at(self, text: str, position: int, depth: int = 0) -> tuple[Any, int]:
        """The value at a position, and where it ends."""
        if depth > MAX_DEPTH:
            raise LiteralError(f"nested more than {MAX_DEPTH} deep", position)
        if text.startswith("{", position):
            return self._object(text, position + 1, depth + 1)
        if text.startswith("[", position):
            return self._list(text, position + 1, depth + 1)
        if (word := _WORD.match(text, position)) is not None:
            return _WORDS[word.group()], word.end()
        if (number := _NUMBER.match(text, position)) is not None:
            return _number(number), number.end()
        return self.string(text, position)

    def _object(self, text: str, position: int, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        position = _space(text, position)
        if text.startswith("}", position):
            return members, position + 1
        while True:
            key, position = self._key(text, position)
            position = _space(text, position)
            if not text.startswith(":", position):
                raise LiteralError("expected ':'", position)
            if key in members:
                raise LiteralError(f"the key {key[:40]!r} is given twice", position)
            members[key], position = self.read_at(text, _space(text, position + 1), depth)
            position, closed = _next_item(text, position, "}")
            if closed:
                return members, position

    def _list(self, text: str, position: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        position = _space(text, position)
        if text.startswith("]", position):
            return items, position + 1
        while True:
            item, position = self.read_at(text, position, depth)
            items.append(item)
            position, closed = _next_item(text, position, "]")
            if closed:
                return items, position

    def _key(self, text: str, position: int) -> tuple[str, int]:
        bare = self.bare_key.match(text, position) if self.bare_key else None
        return (bare.group(), bare.end()) if bare else self.string(text, position)


def python_string(text: str, position: int) -> tuple[str, int]:
    """A string in single or double quotes, as Python writes it. An unknown escape stays."""
    string = _PYTHON_STRING.match(text, position)
    if string is None:
        raise LiteralError("expected a value", position)
    body = string.group(string.lastgroup or 0)
    try:
        return (_ESCAPE.sub(_escaped, body) if "\\" in body else body), string.end()
    except ValueError as error:
        raise LiteralError(str(error), position) from None


def _escaped(match: re.Match[str]) -> str:
    code = match.group(1)
    if len(code) > 1:
        value = int(code[1:], 16)
        if value > 0x10FFFF:
            raise ValueError(f"\\{code} is no character")
        return chr(value)
    return _ESCAPES.get(code, "\\" + code)


def _next_item(text: str, position: int, close: str) -> tuple[int, bool]:
    """The position after a comma or after the closing bracket, and whether it was the bracket."""
    position = _space(text, position)
    if text.startswith(close, position):
        return position + 1, True
    if not text.startswith(",", position):
        raise LiteralError(f"expected ',' or '{close}'", position)
    position = _space(text, position + 1)
    return (position + 1, True) if text.startswith(close, position) else (position, False)


def _number(match: re.Match[str]) -> int | float:
    text = match.group()
    try:
        value = int(text) if match.group("fraction") == "" else float(text)
    except ValueError:
        raise LiteralError("an integer has too many digits", match.start()) from None
    if not math.isfinite(value):
        raise LiteralError(f"the number {text[:40]} is out of range", match.start())
    return value


def _space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "True": True,
    "False": False,
    "None": None,
}
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)})(?![\w.])")
_NUMBER = re.compile(
    r"-?(?:0|[1-9]\d*)(?P<fraction>(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])", re.ASCII
)
_ESCAPES = {
    "\\": "\\",
    "'": "'",
    '"': '"',
    "\n": "",
    "/": "/",
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "a": "\a",
    "v": "\v",
    "0": "\0",
}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_PYTHON_STRING = re.compile(
    r"'(?P<single>(?:[^'\\]++|\\.)*+)'|\"(?P<double>(?:[^\"\\]++|\\.)*+)\"", re.DOTALL
)

PYTHON = Literals(python_string)
"""What Python's `repr` writes for a JSON value. JSON itself is read too, but for pairs of
surrogates."""
