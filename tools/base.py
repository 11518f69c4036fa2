"""The tool contract, verl's: create, execute, calc_reward, release; one instance per trajectory.

Tools here and verl's own meet by shape, not by inheritance: `registry.py` accepts any class whose instances have
these four coroutines, `tool_schema` and `name`, and nothing here imports verl.

What a tool may raise from `execute`:

ToolError      text for the model: its call could not be served, and why
BackendError   the tool's backend could not be reached or broke: infrastructure, never the model's fault
anything else  a bug of the tool: kept in the ledger, told to the model in one line without internals

ToolsError     a user's mistake: a config or machine that cannot work; the command line prints it
├── ToolConfigError      tools.yaml is wrong
├── SandboxUnavailable   this machine cannot isolate code
└── SearchUnavailable    there is nothing to search: no corpus or index, or one that cannot be read
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, ClassVar


class ToolsError(Exception):
    """Root of what this package raises for a user to read."""


class ToolConfigError(ToolsError):
    """tools.yaml, or a class it names, is wrong."""


class SandboxUnavailable(ToolsError):  # noqa: N818 - a state of the machine, named as such
    """This machine cannot isolate code; the message says why and what to do."""


class SearchUnavailable(ToolsError):  # noqa: N818 - likewise
    """A corpus or an index is missing or wrong; the message says where and what to do."""


class ToolError(Exception):
    """A call that could not be served. `str(error)` is shown to the model; `metrics` (JSON values) go into the ledger."""

    def __init__(self, message: str, metrics: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.metrics = metrics or {}


class BackendError(Exception):
    """The tool's backend could not be reached or broke; the trajectory becomes an `infra_error`."""


@dataclass(frozen=True, slots=True)
class ToolResponse:
    """What a tool answers. Only `text` reaches the model; `image` and `video` are carried for verl's tools."""

    text: str | None = None
    image: list[Any] | None = None
    video: list[Any] | None = None


class BaseTool:
    """A tool class named in tools.yaml.

    `config` is the YAML's `config` mapping; `tool_schema` the OpenAI function schema exactly as written there
    (a plain dict, nothing dropped).
    """

    # What `config` may hold beside the dispatcher's own keys; None: anything. A wrong key is named when the tool is loaded.
    config_keys: ClassVar[frozenset[str] | None] = None
    # How long one call may take, and how many may run at a time, where the config does not say.
    timeout_s: float = 60.0
    max_concurrency: int | None = None
    # Whether a call may be sent again when it is not known if the first one had an effect. Without it none is retried.
    idempotent: bool = False

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        self.config = config
        self.tool_schema = tool_schema
        self.name: str = tool_schema["function"]["name"]

    async def start(self) -> None:
        """Makes ready what all trajectories share. Called before the first of them; raises ToolsError where it cannot be had."""

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        """Starts the state of one trajectory; returns its id and what to show the model after the prompt, if anything.

        All tools of a trajectory are given the same `instance_id`.
        """
        return instance_id or uuid.uuid4().hex, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Serves one call. Returns (response, step reward or None, metrics: JSON values)."""
        raise NotImplementedError

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        """The trajectory's reward by this tool; None where it has none."""
        return None

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Frees the state of one trajectory. Called once, in every path."""

    async def close(self) -> None:
        """Frees what all trajectories share (connections, a backend started on demand). Safe to call twice."""
