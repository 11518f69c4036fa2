"""Values that a user wrote, read by pydantic: one clear line for the first mistake.

A line says where, what is allowed and what was given: `config.retries must be at most 10, got 11`.
Nothing is converted: text is no number, and `"no"` is no boolean.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

import pydantic

from tools.base import ToolConfigError

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
"""For the models of this package: no unknown key, no conversion, and infinity is no number."""

MAX_SHOWN_CHARS = 200

T = TypeVar("T")

# By pydantic's type of error; the braces are filled from the error's context.
_RULES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "value_error": "{error}",
}


def read(kind: type[T], given: object, where: str) -> T:
    """`given` as a model or a TypedDict. Raises ToolConfigError; `where` is the place it names."""
    try:
        made: T = _adapter(kind).validate_python(given)  # type: ignore[arg-type]
        return made
    except pydantic.ValidationError as error:
        raise ToolConfigError(first_problem(error, kind, where)) from error


def first_problem(error: pydantic.ValidationError, kind: type, where: str = "") -> str:
    """One line about a validation that failed.

    An unknown key comes first: a wrong name explains the other problems.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path, got = problem["loc"], problem["input"]
    if problem["type"] == "extra_forbidden":
        return unknown_key(_place(where, path[:-1]), path[-1], _keys(kind, path[:-1]))
    if problem["type"] == "invalid_key" or (path and path[-1] == "[key]"):
        said = f"has the key {got!r}, which YAML reads as {type(got).__name__}; put it in quotes"
        inside = path[: -2 if path[-1] == "[key]" else -1]
        return f"{_place(where, inside) or 'the entry'} {said}"
    if problem["type"] == "missing":
        return f"{_place(where, path)} is missing"
    context = {name: _number(value) for name, value in problem.get("ctx", {}).items()}
    rule = _RULES.get(problem["type"], problem["msg"]).format_map(context)
    got_it = "" if rule == "must not be empty" else f", got {_shown(got)}"
    return f"{_place(where, path)} {rule}{got_it}".lstrip()


def nearest(wrong: str, right: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a list of what is allowed if nothing is close."""
    right = sorted(right)
    if close := get_close_matches(wrong, right, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(right)}" if right else ""


def check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises ToolConfigError for an unknown key, with the nearest known one."""
    known = frozenset(known)
    for key in given:
        if key not in known:
            raise ToolConfigError(unknown_key(where, key, known))


def unknown_key(where: str, key: object, known: Iterable[str]) -> str:
    """The line about a key that is not known."""
    return f"{where or 'the entry'} has no key {key!r}{nearest(str(key), known)}"


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _place(where: str, path: Iterable[object]) -> str:
    return ".".join(filter(None, (where, *map(str, path))))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def _keys(kind: Any, path: Iterable[object]) -> Iterable[str]:
    """The keys that are allowed at a path of a model or a TypedDict."""
    for name in path:
        hint = typing.get_type_hints(kind).get(str(name))
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        kind = next((option for option in options if hasattr(option, "__annotations__")), None)
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return kind.model_fields
    return typing.get_type_hints(kind) if kind else ()


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
