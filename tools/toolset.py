"""The tools of a run: names, tools, lossless schemas, and what the dispatcher needs to call them.

Validators, limits and what `create` accepts are determined once, when the set is made: a call costs
a dictionary lookup and a validation. Making a set needs no event loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tools.base import ToolConfigError, ToolsError
from tools.function import FunctionTool
from tools.policy import Policy, check_config_keys, read_policy, read_policy_config
from tools.schema import CheckedSchema, check_tool_schema


@runtime_checkable
class Tool(Protocol):
    """The shape of any tool: ours, verl's, a user's. `tools.base` says what each coroutine does."""

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
    """One tool, ready to be called. `schema` is the OpenAI function schema, nothing dropped."""

    name: str
    tool: Tool
    schema: dict[str, Any]
    ends_conversation: bool
    policy: Policy
    _checked: CheckedSchema = field(repr=False)
    _create: CreateSignature = field(repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What models will stumble over in its schema, one line each."""
        return self._checked.warnings

    @property
    def takes_image(self) -> bool:
        """Whether its `create` is given a PIL image, `image`."""
        return bool(getattr(self.tool, "takes_image", False))

    @property
    def asks_model(self) -> bool:
        """Whether `execute` is given `model`, the conversation's own; see `BaseTool`."""
        return getattr(self.tool, "asks_model", False) is True

    def validate(self, arguments: object) -> list[str]:
        """What is wrong with a call's arguments, one line for each field; empty if nothing is."""
        return self._checked.errors(arguments)

    def create_kwargs(self, given: Mapping[str, Any], ground_truth: Any = None) -> dict[str, Any]:
        """The keywords for this tool's `create`: a row's `create_kwargs`, and the ground truth.

        The ground truth is left out if `create` does not take it. Raises ToolConfigError if the row
        gives a keyword that `create` does not take.
        """
        return self._create.keywords(self.name, given, ground_truth)


@dataclass(frozen=True, slots=True)
class CreateSignature:
    """Which keywords a class's `create` takes.

    verl up to 0.6 calls `create(**create_kwargs)`, later versions `create(create_kwargs={...})`. A
    class of verl's that takes any keyword may be written for either, and gets both.
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
                f"tool {tool}: create() does not take {unknown[0]!r} from the row's create_kwargs; "
                f"it takes {takes}"
            )
        return flat


class ToolSet(Mapping[str, LoadedTool]):
    """Tools by name, in the model's order. `source_text` is the YAML that they came from."""

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
        """A set from functions (decorated with `@tool` or not) and tool instances."""
        return cls(loaded_tool(made) for made in map(_as_tool, tools))

    def __getitem__(self, name: str) -> LoadedTool:
        return self._tools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The OpenAI schemas that are offered, in order, lossless."""
        return [loaded.schema for loaded in self._tools.values()]

    @property
    def warnings(self) -> list[str]:
        """What models will stumble over in the tools' schemas, one line each."""
        return [
            f"tool {name}: {warning}"
            for name, loaded in self._tools.items()
            for warning in loaded.warnings
        ]

    async def start(self) -> None:
        """Makes every tool ready, before the first trajectory. Raises ToolsError."""
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
        """Closes all tools, even if some fail to close; then raises ToolsError with their names."""
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
    """A tool with its limits read from its `config` and its schema checked.

    schema: in place of the tool's own, which may be lossy

    Raises ToolConfigError: a schema or a limit that cannot be used.
    """
    schema = copy.deepcopy(schema if schema is not None else _own_schema(tool))
    checked = check_tool_schema(schema)
    config: Mapping[str, Any] = getattr(tool, "config", None) or {}
    check_config_keys(config, getattr(tool, "config_keys", None))
    verl = is_verl(type(tool))
    return LoadedTool(
        name=checked.name,
        tool=tool,
        schema=schema,
        ends_conversation=read_policy_config(config, verl=verl).get("ends_conversation", False),
        policy=read_policy(config, tool, verl=verl),
        _checked=checked,
        _create=CreateSignature.of(tool.create, verl=verl),
    )


def is_verl(tool_class: type) -> bool:
    """Whether a class derives from verl's BaseTool; verl is not imported for that."""
    return any(
        base.__name__ == "BaseTool" and base.__module__.split(".")[0] == "verl"
        for base in tool_class.__mro__
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
