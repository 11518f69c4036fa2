"""A call format: how a family of models writes tool calls in the text of a turn.

Contract of every `parse`, whatever the format (hermes.py is the model of it):
- It never raises on text, and takes linear time on any text.
- Nothing vanishes: what opens a call and is not a well-formed call becomes a `MalformedToolCall`
  with its verbatim block and a reason that the model can act on. A call that was not finished is
  malformed, never run.
- A good call stays good beside a bad one. Calls are in the order in which they were written.
- `content` is the text with the call blocks cut out, nothing stripped.
- Calls inside a thought are thoughts, not calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from conversations.formats.blocks import THINK, Thought
from conversations.messages import ParsedTurn

Schema = Mapping[str, Any]
"""A JSON schema."""


@dataclass(frozen=True, slots=True)
class ParameterTypes:
    """The declared schema of each parameter of each offered tool, for formats that write values as
    plain text.
    """

    by_tool: Mapping[str, Mapping[str, Schema]] = field(default_factory=dict)

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]]) -> ParameterTypes:
        """The parameters of OpenAI tool schemas, as a record's `tools` has them.

        A parameter's schema holds its tool's `$defs`, so that it can be read alone.
        """
        return cls(_Offered(tools))

    def schema(self, tool: str, parameter: str) -> Schema | None:
        """The schema of a parameter, None if the tool is not offered or does not declare it."""
        return self.by_tool.get(tool, {}).get(parameter)


class _Offered(Mapping[str, Mapping[str, Schema]]):
    """The parameters of tools, looked up on demand: most turns call one tool or none."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = tools

    @functools.cached_property
    def _functions(self) -> dict[str, Mapping[str, Any]]:
        return {tool["function"]["name"]: tool["function"] for tool in self._tools}

    def __getitem__(self, name: str) -> Mapping[str, Schema]:
        return _parameters(self._functions[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Schema]:
    parameters = function.get("parameters") or {}
    properties: Mapping[str, Schema] = parameters.get("properties") or {}
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    if not shared:
        return properties
    return {
        name: {**shared, **schema} if isinstance(schema, Mapping) else schema
        for name, schema in properties.items()
    }


NO_TYPES = ParameterTypes()


class Parse(Protocol):
    """Reads one sampled turn. `in_think`: the generation prompt opened a `<think>` block."""

    def __call__(
        self, raw: str, types: ParameterTypes, *, in_think: bool = False
    ) -> ParsedTurn: ...


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A format by name. `aliases` are what verl, SGLang or vLLM call the same parser.

    `taught_by` are pieces of text that all stand in a prompt whose system text teaches the format.
    They count only for templates that never print a call. `is_typed` is False if values need no
    declared types: then `parse` gets `NO_TYPES`. `thought`: the tags around the model's thoughts.
    """

    name: str
    parse: Parse
    aliases: tuple[str, ...] = ()
    taught_by: tuple[str, ...] = ()
    is_typed: bool = True
    thought: Thought = THINK
