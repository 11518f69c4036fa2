"""OpenAI function schemas: checked when a tool is loaded, then used to check each call's arguments.

A schema reaches the model exactly as it was written. It is read under the dialect that its
`$schema` names (2020-12 if it names none), and as OpenAPI does where it says `nullable: true`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import jsonschema_rs
from jsonschema_rs import ValidationError, ValidationErrorKind

from tools.base import ToolConfigError
from tools.reading import nearest

MAX_ERRORS = 8
MAX_ERROR_CHARS = 300

_PARAMETERS = "tool_schema.function.parameters"

# A schema below a schema: alone, in a list, or under names. `items` is the first or the second.
_ONE = (
    *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_MANY = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")

_IS_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
}

# What people write who think in Python, BFCL or C.
_OTHER_NAMES = {
    "bool": "boolean",
    "dict": "object",
    "double": "number",
    "float": "number",
    "int": "integer",
    "list": "array",
    "none": "null",
    "nonetype": "null",
    "set": "array",
    "str": "string",
    "text": "string",
    "tuple": "array",
}


class Validator(Protocol):
    """What jsonschema_rs's classes, one for each dialect, have in common."""

    def iter_errors(self, instance: Any) -> Iterator[ValidationError]: ...


@dataclass(frozen=True, slots=True)
class CheckedSchema:
    """A function schema that can be offered; `warnings` say what models will stumble over."""

    name: str
    warnings: tuple[str, ...]
    _validator: Validator = field(repr=False)

    def errors(self, arguments: object) -> list[str]:
        """What is wrong with a call's arguments, one line for each field; empty if nothing is."""
        errors = sorted(self._validator.iter_errors(arguments), key=_path)
        return [_argument_error(error) for error in errors[:MAX_ERRORS]]


def check_tool_schema(schema: object) -> CheckedSchema:
    """Checks an OpenAI function schema. Raises ToolConfigError, which names the place."""
    function = schema.get("function") if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping):
        raise ToolConfigError(
            "tool_schema must be {type: function, function: {name, description, parameters}}"
        )
    try:
        _check_json(schema, "tool_schema")
    except RecursionError as error:
        raise ToolConfigError(
            "tool_schema is nested too deeply, or holds itself through a YAML alias"
        ) from error
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ToolConfigError(f"tool_schema.function.name must be non-empty text, got {name!r}")
    if not isinstance(description := function.get("description"), (str, type(None))):
        raise ToolConfigError(f"tool_schema.function.description must be text, got {description!r}")
    parameters = function.get("parameters", {"type": "object", "properties": {}})
    return _checked_parameters(name, parameters)


def check_can_be_met(schema: Mapping[str, Any]) -> None:
    """Refuses a schema that was checked but that no sensible call can meet.

    Raises ToolConfigError: an enum of YAML booleans for a string, or a required property that is
    neither described nor allowed.
    """
    for place, sub in _subschemas(_parameters_of(schema), _PARAMETERS):
        for index, option in enumerate(_options(sub)):
            if isinstance(option, bool) and not _is_allowed(option, sub):
                raise ToolConfigError(
                    f"{place}.enum.{index} is {json.dumps(option)}, but the type is "
                    f"{_types(sub)}: YAML reads yes, no, on and off as booleans; put it in quotes"
                )
        if sub.get("additionalProperties") is False and not sub.get("patternProperties"):
            for name in _undescribed(sub):
                hint = nearest(name, sub["properties"])
                raise ToolConfigError(
                    f"{place}.required names {name!r}, which is no property and, with "
                    f"additionalProperties: false, may not be given{hint}"
                )


# ---------------------------------------------------------------------- when it is loaded


def _checked_parameters(name: str, parameters: object) -> CheckedSchema:
    if not isinstance(parameters, Mapping):
        raise ToolConfigError(
            f"{_PARAMETERS} must be a JSON schema of type object, got {type(parameters).__name__}"
        )
    for place, sub in _subschemas(parameters, _PARAMETERS):
        _check_type_names(sub, place)
    try:
        validator = _validator(_with_nullable(parameters))
    except ValidationError as error:
        raise ToolConfigError(_schema_error(error)) from error
    if "object" not in parameters.get("type", "object"):  # a list of types, or one
        raise ToolConfigError(
            f"{_PARAMETERS} must be a JSON schema of type object, got type {parameters['type']}"
        )
    return CheckedSchema(name, tuple(_warnings(parameters)), validator)


def _validator(parameters: Mapping[str, Any]) -> Validator:
    """Nothing is fetched, whatever a $ref names."""
    try:
        return jsonschema_rs.validator_for(dict(parameters), offline=True)
    except ValidationError as error:
        is_tuple = isinstance(error.instance, list) and _path(error)[-1:] == ["items"]
        if not is_tuple or "$schema" in parameters:
            raise
        # Up to draft 2019-09 a tuple is a list under `items`; most of these name no dialect.
        return jsonschema_rs.Draft7Validator(dict(parameters), offline=True)


def _schema_error(error: ValidationError) -> str:
    if error.kind.name == "$ref":
        said = _clip(error.message)
        return f"{_PARAMETERS}: a $ref points nowhere ({said}); put what it names under $defs"
    place = ".".join([_PARAMETERS, *_path(error)])
    first_line = error.message.splitlines()[0]
    return f"{place} is not valid JSON schema: {_clip(first_line)}"


def _check_type_names(schema: Mapping[str, Any], place: str) -> None:
    """A wrong name of a type gets the nearest right one."""
    given = schema.get("type")
    for name in given if isinstance(given, list) else [given]:
        if not isinstance(name, str) or name in _IS_OF_TYPE:
            continue
        if name.lower() == "any":
            hint = "; leave type out if any value is right"
        elif meant := _OTHER_NAMES.get(name.lower()):
            hint = f"; did you mean {meant!r}?"
        else:
            hint = nearest(name, _IS_OF_TYPE)
        raise ToolConfigError(f"{place}.type: JSON schema has no type {name!r}{hint}")


def _warnings(parameters: Mapping[str, Any]) -> Iterator[str]:
    for place, sub in _subschemas(parameters, "parameters"):
        for name in _undescribed(sub):
            yield f"{place}.required names {name!r}, which no property describes" + (
                nearest(name, sub["properties"])
            )
        if "default" in sub and not _is_allowed(sub["default"], sub):
            yield (
                f"{place}.default is {json.dumps(sub['default'])}, but the type is {_types(sub)}: "
                "a call that gives the default is refused"
            )
        for option in _options(sub):
            if problem := _option_problem(option, sub):
                yield f"{place}.enum holds {json.dumps(option)}{problem}"


def _option_problem(option: Any, schema: Mapping[str, Any]) -> str | None:
    if isinstance(option, bool) and any(isinstance(other, str) for other in _options(schema)):
        return " beside text: YAML reads yes, no, on and off so; put it in quotes if it is text"
    if not _is_allowed(option, schema):
        return f", but the type is {_types(schema)}: a call that gives it is refused"
    return None


def _options(schema: Mapping[str, Any]) -> list[Any]:
    options = schema.get("enum")
    return options if isinstance(options, list) else []


def _undescribed(schema: Mapping[str, Any]) -> list[str]:
    """The required names that no property describes, in a schema that describes some."""
    names, required = schema.get("properties"), schema.get("required")
    if not isinstance(names, Mapping) or not isinstance(required, list):
        return []
    if schema.get("patternProperties"):
        return []
    return [name for name in required if isinstance(name, str) and name not in names]


def _is_allowed(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is of its schema's type; True if the schema names none."""
    if value is None and schema.get("nullable") is True:
        return True
    names = _type_names(schema)
    return not names or any(_IS_OF_TYPE[name](value) for name in names)


def _type_names(schema: Mapping[str, Any]) -> list[str]:
    given = schema.get("type")
    names = given if isinstance(given, list) else [given]
    return [name for name in names if isinstance(name, str) and name in _IS_OF_TYPE]


def _types(schema: Mapping[str, Any]) -> str:
    return " or ".join(_type_names(schema))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_nullable(value: Any) -> Any:
    """A copy for the validator in which `nullable: true` allows null."""
    if not isinstance(value, Mapping):
        return value
    made = dict(value)
    for key, item in value.items():
        if key in _NAMED and isinstance(item, Mapping):
            made[key] = {name: _with_nullable(sub) for name, sub in item.items()}
        elif key in _MANY and isinstance(item, list):
            made[key] = [_with_nullable(sub) for sub in item]
        elif key in _ONE:
            made[key] = _with_nullable(item)
    return _nullable(made) if value.get("nullable") is True else made


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    given = schema.get("type")
    if given is None or "const" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    schema["type"] = [*(given if isinstance(given, list) else [given]), "null"]
    if isinstance(options := schema.get("enum"), list) and None not in options:
        schema["enum"] = [*options, None]
    return schema


def _subschemas(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A schema and all schemas below it, each with its place; values such as defaults are none."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for key, item in schema.items():
        if key in _NAMED and isinstance(item, Mapping):
            for name, sub in item.items():
                yield from _subschemas(sub, f"{place}.{key}.{name}")
        elif key in _MANY and isinstance(item, list):
            for index, sub in enumerate(item):
                yield from _subschemas(sub, f"{place}.{key}.{index}")
        elif key in _ONE:
            yield from _subschemas(item, f"{place}.{key}")


def _parameters_of(schema: Mapping[str, Any]) -> Any:
    return schema["function"].get("parameters")


def _check_json(value: Any, where: str) -> None:
    """The model and the record get a schema as JSON; YAML can hold more than that."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                kind = type(key).__name__
                raise ToolConfigError(
                    f"{where} has the key {key!r}, which YAML reads as {kind}; put it in quotes"
                )
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(item, f"{where}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ToolConfigError(f"{where} is {value}, which is no number in JSON; leave it out")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ToolConfigError(
            f"{where} is a {type(value).__name__} ({value}), which JSON does not have; "
            "put it in quotes if it is text"
        )


# ---------------------------------------------------------------------- when it is called


def _argument_error(error: ValidationError) -> str:
    """The field and what is wrong with it; if several schemas would do, what is wrong by each."""
    path = _path(error)
    alternatives = []
    for leaf in islice(_leaves(error), MAX_ERRORS) if _inner(error) else ():
        inside = ".".join(_path(leaf)[len(path) :])
        alternatives.append(f"{inside}: {_message(leaf)}" if inside else _message(leaf))
    said = f"{'.'.join(path) or 'arguments'}: {_message(error)}"
    return f"{said} ({'; '.join(alternatives)})" if alternatives else said


def _message(error: ValidationError) -> str:
    """What is wrong. The validator names two of an enum's values; the model needs them all."""
    if isinstance(error.kind, ValidationErrorKind.Enum):
        instance, options = (
            json.dumps(value, ensure_ascii=False) for value in (error.instance, error.kind.options)
        )
        return f"{_clip(instance)} is not one of {_clip(options)}"
    return _clip(error.message)


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """The errors that an `anyOf` or a `oneOf` comes down to, at any depth."""
    if not (inner := _inner(error)):
        yield error
    for one in inner:
        yield from _leaves(one)


def _inner(error: ValidationError) -> list[ValidationError]:
    """What is wrong by each of the schemas that would do, one after the other."""
    return [inner for branch in getattr(error.kind, "context", ()) for inner in branch]


def _path(error: ValidationError) -> list[str]:
    return [str(part) for part in error.instance_path]


def _clip(text: str) -> str:
    if len(text) <= MAX_ERROR_CHARS:
        return text
    half = MAX_ERROR_CHARS // 2
    return f"{text[:half]} ... {text[-half:]}"
