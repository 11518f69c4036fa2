"""The tools of a run: a name, the tool, its lossless schema, and what the dispatcher must know to call it.

Everything that can be found out once (the validator, what `create` accepts, the limits) is found out when the set is
made, so that a call costs a dictionary lookup and a validation. Making a set needs no event loop.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from jsonschema_rs import Draft202012Validator, ValidationError, ValidationErrorKind

from tools.base import ToolConfigError, ToolsError
from tools.function import FunctionTool
from tools.policy import Policy, check_config_keys, flag, read_policy

MAX_ERRORS = 8
MAX_ERROR_CHARS = 300


@runtime_checkable
class Tool(Protocol):
    """The shape of a tool: ours, verl's, or anybody's. See `tools.base` for what each coroutine does."""

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, Any]: ...

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, float | None, dict[str, Any]]: ...

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None: ...

    async def release(self, instance_id: str, **kwargs: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedTool:
    """One tool, ready to be called. `schema` is the OpenAI function schema as written, nothing dropped."""

    name: str
    tool: Tool
    schema: dict[str, Any]
    ends_conversation: bool
    policy: Policy
    _validator: Draft202012Validator = field(repr=False)
    _create: CreateSignature = field(repr=False)

    def validate(self, arguments: object) -> list[str]:
        """What is wrong with a call's arguments, one line a field; empty when nothing is."""
        errors = sorted(self._validator.iter_errors(arguments), key=_path)
        return [_argument_error(error) for error in errors[:MAX_ERRORS]]

    def create_kwargs(self, given: Mapping[str, Any], ground_truth: Any = None) -> dict[str, Any]:
        """The keywords for this tool's `create`: a row's `create_kwargs`, and the ground truth where it is taken.

        Raises ToolConfigError when the row gives a keyword that `create` does not take.
        """
        return self._create.keywords(self.name, given, ground_truth)


@dataclass(frozen=True, slots=True)
class CreateSignature:
    """Which keywords a class's `create` takes.

    verl up to 0.6 calls `create(**create_kwargs)`, later versions `create(create_kwargs={...})`. A class that takes any
    keyword and is verl's may have been written for either and gets both.
    """

    names: frozenset[str]
    takes_any: bool
    wants_nested: bool

    @classmethod
    def of(cls, create: Callable[..., Any], *, verl: bool) -> CreateSignature:
        parameters = inspect.signature(create).parameters.values()
        names = frozenset(
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ) - {"instance_id"}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(
            names - {"create_kwargs"}, takes_any, "create_kwargs" in names or (verl and takes_any)
        )

    def keywords(self, tool: str, given: Mapping[str, Any], ground_truth: Any) -> dict[str, Any]:
        merged = dict(given)
        if ground_truth is not None:
            merged.setdefault("ground_truth", ground_truth)
        flat = (
            merged
            if self.takes_any
            else {key: value for key, value in merged.items() if key in self.names}
        )
        if self.wants_nested:
            return {**flat, "create_kwargs": merged}
        if unknown := [key for key in given if key not in flat]:
            takes = ", ".join(sorted(self.names)) or "no keyword"
            raise ToolConfigError(
                f"tool {tool}: create() does not take {unknown[0]!r} from the row's create_kwargs; it takes {takes}"
            )
        return flat


class ToolSet(Mapping[str, LoadedTool]):
    """Tools by name, in the order in which the model sees them. `source_text` is the YAML they came from."""

    def __init__(self, tools: Iterable[LoadedTool], source_text: str = "") -> None:
        self._tools: dict[str, LoadedTool] = {}
        self.source_text = source_text
        for loaded in tools:
            if loaded.name in self._tools:
                raise ToolConfigError(
                    f"two tools are named {loaded.name!r}; each needs a name of its own"
                )
            self._tools[loaded.name] = loaded

    @classmethod
    def from_tools(cls, tools: Iterable[Callable[..., Any] | Tool]) -> ToolSet:
        """A set from Python objects: functions (decorated with `@tool` or not) and tool instances."""
        return cls(loaded_tool(made) for made in map(_as_tool, tools))

    def __getitem__(self, name: str) -> LoadedTool:
        return self._tools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The OpenAI schemas offered, in order, lossless."""
        return [loaded.schema for loaded in self._tools.values()]

    async def start(self) -> None:
        """Makes every tool ready before the first trajectory. Raises ToolsError with one line for the user."""
        for name, loaded in self._tools.items():
            if start := getattr(loaded.tool, "start", None):
                try:
                    await start()
                except ToolsError as error:
                    raise type(error)(f"tool {name}: {error}") from error
                except Exception as error:
                    raise ToolsError(
                        f"tool {name} cannot be started: {type(error).__name__}: {error}"
                    ) from error

    async def close(self) -> None:
        """Closes every tool that can be closed, all of them even if one fails; then raises ToolsError, which names the failed ones."""
        failures: dict[str, Exception] = {}
        for name, loaded in self._tools.items():
            if close := getattr(loaded.tool, "close", None):
                try:
                    await close()
                except Exception as error:
                    failures[name] = error
        if failures:
            said = "; ".join(
                f"tool {name}: {type(error).__name__}: {error}" for name, error in failures.items()
            )
            raise ToolsError(f"closing failed: {said}") from ExceptionGroup(
                "close", list(failures.values())
            )


def loaded_tool(tool: Tool, schema: dict[str, Any] | None = None) -> LoadedTool:
    """A tool with its limits read from its `config` and its schema checked; `schema` where the tool's own is lossy.

    Raises ToolConfigError: a schema or a limit that cannot be used.
    """
    schema = copy.deepcopy(schema if schema is not None else _own_schema(tool))
    name, validator = check_schema(schema)
    config: Mapping[str, Any] = getattr(tool, "config", None) or {}
    check_config_keys(config, getattr(tool, "config_keys", None))
    verl = is_verl(type(tool))
    return LoadedTool(
        name=name,
        tool=tool,
        schema=schema,
        ends_conversation=flag(config, "ends_conversation"),
        policy=read_policy(config, tool, verl=verl),
        _validator=validator,
        _create=CreateSignature.of(tool.create, verl=verl),
    )


def is_verl(tool_class: type) -> bool:
    """Whether a class derives from verl's BaseTool; answered without importing verl."""
    return any(
        base.__name__ == "BaseTool" and base.__module__.split(".")[0] == "verl"
        for base in tool_class.__mro__
    )


def check_schema(schema: object) -> tuple[str, Draft202012Validator]:
    """The name of an OpenAI function schema, and the validator of its parameters. Raises ToolConfigError naming the path."""
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
        raise ToolConfigError(f"tool_schema.function.name must be a non-empty string, got {name!r}")
    if not isinstance(description := function.get("description"), (str, type(None))):
        raise ToolConfigError(
            f"tool_schema.function.description must be a string, got {description!r}"
        )
    parameters = function.get("parameters", {"type": "object", "properties": {}})
    where = "tool_schema.function.parameters"
    if not isinstance(parameters, Mapping):
        raise ToolConfigError(
            f"{where} must be a JSON schema of type object, got {type(parameters).__name__}"
        )
    try:
        validator = Draft202012Validator(
            dict(parameters), offline=True
        )  # nothing is fetched, whatever a $ref names
    except ValidationError as error:
        if error.kind.name == "$ref":
            raise ToolConfigError(
                f"{where}: a $ref points nowhere ({_clip(error.message)}); put what it names under $defs"
            ) from error
        raise ToolConfigError(
            f"{'.'.join([where, *_path(error)])} is not valid JSON schema: {_clip(error.message)}"
        ) from error
    if "object" not in parameters.get("type", "object"):  # a list of types, or one
        raise ToolConfigError(
            f"{where} must be a JSON schema of type object, got type {parameters['type']}"
        )
    return name, validator


def _check_json(value: Any, where: str) -> None:
    """Whatever a schema holds is shown to the model and kept in every record, both as JSON; YAML can say more."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ToolConfigError(
                    f"{where} has the key {key!r}, which YAML reads as {type(key).__name__}; put it in quotes"
                )
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(item, f"{where}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ToolConfigError(f"{where} is {value}, which is no number in JSON; leave it out")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ToolConfigError(
            f"{where} is a {type(value).__name__} ({value}), which JSON does not have; put it in quotes if it is text"
        )


def _as_tool(made: Callable[..., Any] | Tool) -> Tool:
    if not isinstance(made, type):
        if isinstance(made, Tool):
            return made
        if callable(made):
            return FunctionTool(made)
    raise ToolConfigError(f"a tool must be a function or an instance of a tool class, got {made!r}")


def _own_schema(tool: Tool) -> Any:
    schema: Any = getattr(tool, "tool_schema", None)
    return (
        schema.model_dump(exclude_unset=True, exclude_none=True)
        if hasattr(schema, "model_dump")
        else schema
    )


def _argument_error(error: ValidationError) -> str:
    """The field and what is wrong with it; where several schemas would do, what is wrong by each of them."""
    path = _path(error)
    alternatives = []
    for leaf in islice(_leaves(error), MAX_ERRORS) if _inner(error) else ():
        inside = ".".join(_path(leaf)[len(path) :])
        alternatives.append(f"{inside}: {_said(leaf)}" if inside else _said(leaf))
    said = f"{'.'.join(path) or 'arguments'}: {_said(error)}"
    return f"{said} ({'; '.join(alternatives)})" if alternatives else said


def _said(error: ValidationError) -> str:
    """What is wrong. The validator names two of an enum's values; the model needs them all."""
    if isinstance(error.kind, ValidationErrorKind.Enum):
        instance, options = (
            json.dumps(value, ensure_ascii=False) for value in (error.instance, error.kind.options)
        )
        return f"{_clip(instance)} is not one of {_clip(options)}"
    return _clip(error.message)


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """The errors that an `anyOf` or a `oneOf` comes down to, however deep."""
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
    return (
        text
        if len(text) <= MAX_ERROR_CHARS
        else f"{text[: MAX_ERROR_CHARS // 2]} ... {text[-MAX_ERROR_CHARS // 2 :]}"
    )
