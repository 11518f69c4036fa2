"""The tool contract, verl's: create, execute, calc_reward, release; one instance per trajectory.

Tools here and verl's own meet by shape, not by inheritance: `registry.py` accepts any class whose
instances have these four coroutines, `tool_schema` and `name`. Nothing here imports verl.

What a tool may raise from `execute`:

ToolError      text for the model: its call could not be served, and why
BackendError   the tool's backend failed or could not be reached: never the model's fault
anything else  a bug of the tool: kept in the ledger; the model reads one line without internals

ToolsError     a user's mistake: a config or a machine that cannot work; the command line prints it
├── ToolConfigError      tools.yaml is wrong, or an extra is missing
├── SandboxUnavailable   this machine cannot isolate code
└── SearchUnavailable    there is nothing to search: a corpus or an index is missing or broken
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class ToolsError(Exception):
    """Root of the errors that a user reads."""


class ToolConfigError(ToolsError):
    """tools.yaml, or a class it names, is wrong."""


class SandboxUnavailable(ToolsError):  # noqa: N818 - a state of the machine
    """This machine cannot isolate code; the message says why and what to do."""


class SearchUnavailable(ToolsError):  # noqa: N818 - likewise
    """A corpus or an index is missing or wrong; the message says where and what to do."""


class ToolError(Exception):
    """A call that could not be served.

    The model reads `str(error)`; `metrics` (JSON values) go into the ledger.
    """

    def __init__(self, message: str, metrics: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.metrics = metrics or {}


class BackendError(Exception):
    """The tool's backend failed or could not be reached; the trajectory is an `infra_error`."""


@dataclass(frozen=True, slots=True)
class ToolResponse:
    """What a tool answers: a text, and images, which a model that sees reads before the text.

    An image is a PIL image, a file's bytes or a data URL. `video` is carried for verl's tools.
    """

    text: str | None = None
    image: list[Any] | None = None
    video: list[Any] | None = None


class ModelChat(Protocol):
    """A sub-conversation that a tool has with the conversation's model."""

    async def answer(self, said: str | None = None, *, max_tokens: int | None = None) -> str:
        """The model's next turn as text, behind a user message if one is `said`.

        Raises ToolError if the conversation's budgets leave no room for it, BackendError if the
        engine fails: a tool may let both pass.
        """
        ...


class AskModel(Protocol):
    """The model of a conversation, for a tool's call: it answers the tool's own messages.

    Each chat is a branch of the record, its sampled tokens trained like all others. No tools are
    offered in it. The conversation's budgets of tokens and turns, and its deadline, hold for it.
    """

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ModelChat:
        """A chat that begins with these messages (OpenAI's: role and content)."""
        ...

    async def ask(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None
    ) -> str:
        """The model's answer to them, in a chat of their own. Raises as `ModelChat.answer`."""
        ...


class BaseTool:
    """A tool class named in tools.yaml.

    config: the YAML's `config` mapping
    tool_schema: the OpenAI function schema exactly as it is written there, nothing dropped
    """

    # What `config` may hold beside the dispatcher's keys; None: anything.
    config_keys: ClassVar[frozenset[str] | None] = None
    # How long one call may take, and how many run at a time, if the config does not say.
    timeout_s: float = 60.0
    max_concurrency: int | None = None
    # Whether `create` is given `image`, a PIL image: the row's own (create_kwargs), else the first
    # of the conversation; without either it is not given.
    takes_image: bool = False
    # Whether `execute` is given `model`, an `AskModel`: the conversation's own model.
    asks_model: bool = False
    # Whether a call may be sent again although the first one may have had an effect.
    idempotent: bool = False

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        self.config = config
        self.tool_schema = tool_schema
        self.name: str = tool_schema["function"]["name"]

    async def start(self) -> None:
        """Makes ready what all trajectories share, before the first of them. Raises ToolsError."""

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        """Starts the state of one trajectory. All its tools are given the same `instance_id`.

        Returns the id, and a response that the model reads after the prompt if it has text.
        """
        return instance_id or uuid.uuid4().hex, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Serves one call. Returns (response, step reward or None, metrics as JSON values)."""
        raise NotImplementedError

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        """The trajectory's reward from this tool; None if it gives none."""
        return None

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Frees the state of one trajectory. Called exactly once, however the trajectory ends."""

    async def close(self) -> None:
        """Frees what all trajectories share: connections, a started backend. Safe to call twice."""
