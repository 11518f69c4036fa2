"""Values as models write them: strict JSON, Python literals, and Gemma's own quotes.

JSON is strict: no NaN or Infinity, no number, nesting or string that JSON and Python cannot both
hold. Every function raises ValueError with a reason for the model, and nothing else. Linear time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Deeper values are refused: what walks them (schema checks, JSON writers) recurses."""


def read_json(text: str) -> Any:
    """The JSON value that is the whole text, blanks around it aside."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(_short(error)) from None
    check_json(text, value)
    return value


def check_json(text: str, value: Any) -> None:
    """Raises ValueError if a value that was read from `text` is too deep or holds half of a
    surrogate pair."""
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if "\\u" in text or "\\U" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None


ReadString = Callable[[str, int], tuple[str, int]]
"""Reads the string that opens at a position of a text, returns it and where it ends. Raises
ValueError."""


@dataclass(frozen=True, slots=True)
class Literals:
    """A grammar of values: numbers, `true/false/null`, `True/False/None`, lists, objects, and
    strings.

    `bare_key` finds a key without quotes; without it keys are strings.
    """

    string: ReadString
    bare_key: re.Pattern[str] | None = None

    def read(self, text: str) -> Any:
        """The value that is the whole text, blanks around it aside."""
        value, end = self.read_at(text, _space(text, 0))
        if _space(text, end) < len(text):
            raise ValueError(f"more text after the value at character {end}")
        check_json(text, value)
        return value

    def read_at(self, text: str, position: int, depth: int = 0) -> tuple[Any, int]:
        """The value at a position, and where it ends."""
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
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
                raise ValueError(f"expected ':' at character {position}")
            if key in members:
                raise ValueError(f"the key {key[:40]!r} is given twice")
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
    """A string in single or double quotes, as Python writes it."""
    string = _PYTHON_STRING.match(text, position)
    if string is None:
        raise ValueError(f"expected a value at character {position}")
    return unescape(string.group("body")), string.end()


def unescape(body: str) -> str:
    """The text of a Python string literal's body. An unknown escape keeps its backslash, as in
    Python."""
    return _ESCAPE.sub(_escaped, body) if "\\" in body else body


def _escaped(match: re.Match[str]) -> str:
    code = match.group(1)
    if len(code) > 1:
        value = int(code[1:], 16)
        if value > 0x10FFFF:
            raise ValueError(f"\\{code} is no character")
        return chr(value)
    return _ESCAPES.get(code, "\\" + code)


def _short(error: ValueError) -> str:
    """Our own reason, or one line in place of Python's lesson on integers of more than 4,300
    digits."""
    text = str(error)
    return "an integer has too many digits" if text.startswith("Exceeds") else text


def _next_item(text: str, position: int, close: str) -> tuple[int, bool]:
    """The position after a comma or after the closing bracket, and whether it was the bracket."""
    position = _space(text, position)
    if text.startswith(close, position):
        return position + 1, True
    if not text.startswith(",", position):
        raise ValueError(f"expected ',' or '{close}' at character {position}")
    position = _space(text, position + 1)
    return (position + 1, True) if text.startswith(close, position) else (position, False)


def _number(match: re.Match[str]) -> int | float:
    text = match.group()
    return int(text) if match.group("fraction") == "" else _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [item for part in level for item in _items(part)]
    return depth


def _items(part: object) -> list[Any]:
    if isinstance(part, dict):
        return list(part.values())
    return part if isinstance(part, list) else []


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
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
    r"(?P<quote>['\"])(?P<body>(?:[^'\"\\]|\\.|(?!(?P=quote))['\"])*)(?P=quote)", re.DOTALL
)

PYTHON = Literals(python_string)
"""What Python's `repr` writes for a JSON value. JSON itself is read too, but for pairs of
surrogates."""
