"""Parameters that a format writes as plain text: the tool's schema says what they are. One rule for
all formats.

| the schema says | the text is |
|---|---|
| `string` only, or an enum of strings | that string, verbatim |
| types without `string` | JSON, else a Python literal (`True`, `{'a': 1}`), else malformed |
| `string` and others: a union, `nullable` | a literal of one of the others, else the string |
| nothing: not declared, no type, unknown tool | as a union of all types |

So in a union of string, integer and null `7` is the number, `None` is null, `"7"` has its quotes. A
union is ambiguous by the format's own fault: the template writes the number 7 and the string "7"
alike. A value of a wrong type that JSON can read is not malformed: the check of arguments against
the schema answers it. Quotes never make a string: `"7"` for a string parameter keeps its quotes, as
templates write strings without any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conversations.formats.format import Schema
from conversations.formats.json_values import whole_value
from conversations.formats.literals import PYTHON

_ALL = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_STRING = frozenset({"string"})
_MAX_NESTING = 8
"""How deep unions and references are followed; behind that a value may be anything."""


def read_value(text: str, schema: Schema | None) -> Any:
    """The value of a parameter that was written as `text`. Raises ValueError with a reason for the
    model."""
    types = types_of(schema)
    if types == _STRING:
        return text
    if "string" not in types:
        return _literal(text, types)
    try:
        value = _literal(text, types)
    except ValueError:
        return text
    return value if _types_of_value(value) & (types - _STRING) else text


def types_of(schema: object) -> frozenset[str]:
    """The JSON types that a schema allows; all of them if it does not say."""
    return _Reader(schema).types(schema, 0) or _ALL


class _Reader:
    """Reads schemas inside `root`, which holds what they refer to. Each reference is read once."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._followed: set[str] = set()

    def types(self, schema: object, nesting: int) -> frozenset[str]:
        """The types that a schema allows; none if it only refers to what was read before."""
        if not isinstance(schema, Mapping) or nesting > _MAX_NESTING:
            return _ALL
        if "$ref" in schema:
            return self._referred(str(schema["$ref"]), nesting)
        types = self._declared(schema, nesting + 1) or _ALL
        return types | {"null"} if schema.get("nullable") is True else types

    def _declared(self, schema: Mapping[str, Any], nesting: int) -> frozenset[str]:
        """The types a schema names; none if it names none, or one that JSON schema lacks."""
        if (declared := schema.get("type")) is not None:
            listed = declared if isinstance(declared, list) else [declared]
            names = frozenset(name for name in listed if isinstance(name, str))
            return names if names <= _ALL else frozenset()
        if "const" in schema:
            return _types_of_value(schema["const"])
        if isinstance(options := schema.get("enum"), list):
            return _union(_types_of_value(option) for option in options)
        for keyword in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(keyword), list):
                return _union(self.types(part, nesting) for part in parts)
        if isinstance(parts := schema.get("allOf"), list):
            return _ALL.intersection(*(self.types(part, nesting) for part in parts))
        return frozenset()

    def _referred(self, reference: str, nesting: int) -> frozenset[str]:
        if reference in self._followed:
            return frozenset()
        self._followed.add(reference)
        schema = self._root
        for key in reference.removeprefix("#/").split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
        return self.types(schema, nesting + 1)


def _union(types: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*types)


def _types_of_value(value: object) -> frozenset[str]:
    """The type names that a value answers to: 7 is an integer and a number."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, (int, float)):
        whole = isinstance(value, int) or value.is_integer()
        return frozenset({"integer", "number"} if whole else {"number"})
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return frozenset({names.get(type(value), "string")})


def _literal(text: str, types: frozenset[str]) -> Any:
    try:
        return whole_value(text)
    except ValueError as error:
        reason = str(error)
    try:
        return PYTHON.read(text)
    except ValueError:
        wanted = " or ".join(sorted(types))
        raise ValueError(f"must be {wanted}; {reason}") from None
