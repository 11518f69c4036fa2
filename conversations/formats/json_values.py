"""JSON as models write it inside calls: strict, linear, with reasons that a model can act on.

Strict means what RFC 8259 allows and a record can hold: no NaN or Infinity, no raw newline in a
string, no number that Python cannot hold, no nesting deeper than `MAX_DEPTH`, no half of a
surrogate pair. All call formats that write JSON share these rules.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from conversations.messages import MalformedToolCall, ToolCall

MAX_DEPTH = 64
"""Deeper arguments are malformed: schema checks and JSON writers walk them recursively."""

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)
_NAME_VALUE = re.compile(r'\s*:\s*"([^"\\]{1,200})"')
_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


class InvalidJsonError(ValueError):
    """The text is not the JSON value that it should be. The message is the reason for the model."""


@dataclass(frozen=True, slots=True)
class CallObject:
    """The keys of a call that is one JSON object, and the hint that ends every reason.

    `id` is the key of the call's id, None if the format has no ids.
    """

    hint: str
    name: str = "name"
    arguments: tuple[str, ...] = ("arguments",)
    id: str | None = None

    def read(self, value: object, block: str) -> ToolCall | MalformedToolCall:
        """The call that the JSON value is. `block` is its verbatim text."""
        # First what nearly every call is: a turn's cost is counted in microseconds.
        if self.id is None and type(value) is dict:
            name: Any = value.get(self.name)
            arguments: Any = value.get(self.arguments[0])
            is_sound = type(name) is str and name and name.isascii() and type(arguments) is dict
            if is_sound and unstorable(value, block) is None:
                return ToolCall(name, arguments, block)
        if not isinstance(value, dict):
            return MalformedToolCall(
                block, f"a call must be a JSON object, not {kind(value)}; {self.hint}"
            )
        name = self.name_of(value)
        if not name:
            reason = f'"{self.name}" must be a non-empty string'
            return MalformedToolCall(block, f"{reason}; {self.hint}")
        written = [key for key in self.arguments if key in value]
        if not written and (others := [key for key in value if key not in (self.name, self.id)]):
            keys = ", ".join(map(repr, others))[:200]
            reason = f'the key is "{self.arguments[0]}", not {keys}'
            return MalformedToolCall(block, f"{reason}; {self.hint}", name)
        call_id = value.get(self.id) if self.id else None
        return checked_call(
            name,
            value[written[0]] if written else {},
            block,
            self.hint,
            call_id if isinstance(call_id, str) else None,
        )

    def name_of(self, value: object) -> str | None:
        """The name in a JSON value that may not be a call."""
        name = value.get(self.name) if isinstance(value, dict) else None
        return name if isinstance(name, str) and _is_encodable(name) else None

    def is_meant(self, value: object, offered: Mapping[str, Any]) -> bool:
        """Whether a JSON value without a token around it is meant as a call.

        It is if it has arguments, or the name of an offered tool. Other JSON is an answer.
        """
        if not isinstance(value, dict):
            return False
        return any(key in value for key in self.arguments) or self.name_of(value) in offered


def checked_call(
    name: str, arguments: object, block: str, hint: str, call_id: str | None = None
) -> ToolCall | MalformedToolCall:
    """A call with these arguments, or why there is none.

    A string that holds a JSON object is that object: some models encode twice.
    """
    if not name or not _is_encodable(name):
        return MalformedToolCall(block, f"a call needs a name; {hint}")
    if isinstance(arguments, str):
        arguments = _decoded(arguments)
    if not isinstance(arguments, dict):
        reason = f'"arguments" must be a JSON object, not {kind(arguments)}'
        return MalformedToolCall(block, f"{reason}; {hint}", name)
    if (flaw := unstorable(arguments, block)) is not None:
        return MalformedToolCall(block, f"{flaw}; {hint}", name)
    return ToolCall(name, arguments, block, call_id or None)


def unstorable(value: object, text: str) -> str | None:
    """Why a record cannot hold a value that was read from this text, None if it can."""
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if ("\\u" in text or "\\U" in text) and not _is_encodable(value):
        return "a string holds half of a surrogate pair"
    return None


class JsonReader:
    """Reads the JSON values of one call block, in order, in linear time.

    `stops` finds what can stand inside a JSON string, but nowhere else in JSON: the format's tags.
    The text up to the next stop is read first, and twice as far only if a string is still open
    there: an error costs the length of the text that was looked at, not of the whole turn.
    """

    __slots__ = ("_end", "_start", "_stops", "_text", "_window")

    def __init__(self, text: str, start: int, stops: re.Pattern[str]) -> None:
        self._text, self._start, self._stops = text, start, stops
        self._end = self._next_stop(start)
        self._window = text[start : self._end]

    def value(self, position: int) -> tuple[object, int]:
        """The value at `position` and where it ends. Raises InvalidJsonError."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, position - self._start)
            except json.JSONDecodeError as error:
                if self._end == len(self._text) or not _ends_in_string(error):
                    raise InvalidJsonError(_reason(error, position - self._start)) from error
                self._widen()
            except (ValueError, RecursionError) as error:
                raise InvalidJsonError(_reason(error)) from error
            else:
                return value, self._start + end

    def _widen(self) -> None:
        self._end = self._next_stop(self._end + (self._end - self._start) + 1)
        self._window = self._text[self._start : self._end]

    def _next_stop(self, position: int) -> int:
        stop = self._stops.search(self._text, position)
        return stop.start() if stop else len(self._text)


def written_name(block: str, key: str = "name") -> str | None:
    """The name that a block which is not JSON gives its call, never one that stands deeper."""
    depth, quoted = 0, f'"{key}"'
    for token in _STRING_OR_BRACKET.finditer(block):
        text = token.group()
        if text in ("{", "["):
            depth += 1
        elif text in ("}", "]"):
            depth -= 1
        elif depth <= 1 and text == quoted and (value := _NAME_VALUE.match(block, token.end())):
            return value.group(1)
    return None


def whole_value(text: str) -> object:
    """The JSON value that is the whole text, blanks around it aside. Raises InvalidJsonError."""
    try:
        value: object = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidJsonError(_reason(error, of="the value")) from error
    if (reason := unstorable(value, text)) is not None:
        raise InvalidJsonError(reason)
    return value


def kind(value: object) -> str:
    """What a JSON value other than an object is, with its article."""
    return _KINDS.get(type(value), "a number")


def _decoded(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


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


def _is_encodable(value: Any) -> bool:
    if isinstance(value, str) and value.isascii():
        return True
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _ends_in_string(error: json.JSONDecodeError) -> bool:
    r"""Whether a string was still open at the end; a \uXXXX there is reported as a bad one."""
    return error.msg.startswith("Unterminated string") or (
        error.msg.startswith("Invalid \\u") and error.pos >= len(error.doc) - 5
    )


def _reason(error: Exception, start: int = 0, of: str = "the call") -> str:
    if isinstance(error, json.JSONDecodeError):
        position = error.pos - start
        place = f"{error.msg.removesuffix(' at')} at character {position} of {of}"
        if error.msg.startswith("Invalid control character"):
            place += r" (inside a string write \n for a newline and \t for a tab)"
        return f"not valid JSON: {place}"
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    if isinstance(error, InvalidJsonError):
        return f"not valid JSON: {error}"
    limit = sys.get_int_max_str_digits()  # beyond it, int() raises
    return f"not valid JSON: a number has more than {limit} digits"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidJsonError(f"the number {text[:40]} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise InvalidJsonError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
