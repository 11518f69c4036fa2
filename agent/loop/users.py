"""User turns that a program takes: verl's interactions, from the YAML that `interaction_config_path` names.

A turn without a tool call is answered by the interaction that the row's `interaction_kwargs` choose: with a user
message, or with the end of the conversation. Their contract is verl 0.6.1's (`verl/interactions/base.py`):
`start_interaction(instance_id, **kwargs)`, `generate_response(instance_id, messages, **kwargs) -> (ends, text, reward,
metrics)`, `finalize_interaction(instance_id)`. Each conversation has an instance of its own, finalized in every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from agent.errors import ConfigError, TaskError
from agent.loop.boundary import describe
from conversations.encoding import without_lone_surrogates
from conversations.messages import Message
from tools.base import ToolConfigError
from tools.policy import nearest
from tools.registry import import_attribute

T = TypeVar("T")

DEFAULT_NAME = "gsm8k"
"""verl's, for rows that name no interaction."""
DEFAULT_TIMEOUT_S = 60.0


class Interaction(Protocol):
    """What a class named in the YAML must have."""

    async def start_interaction(self, instance_id: str, **kwargs: Any) -> Any: ...

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **kwargs: Any
    ) -> tuple[bool, str, float | None, dict[str, Any]]: ...

    async def finalize_interaction(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class LoadedInteraction:
    """`timeout_s` bounds each of its coroutines: the config's, else a minute."""

    name: str
    interaction: Interaction
    timeout_s: float


class Interactions(dict[str, LoadedInteraction]):
    """All of a run's, by name. `source_text` is the YAML they came from."""

    def __init__(self, loaded: Sequence[LoadedInteraction], source_text: str) -> None:
        super().__init__((item.name, item) for item in loaded)
        self.source_text = source_text

    def chosen(self, kwargs: Mapping[str, Any]) -> LoadedInteraction:
        """The one that a row's `interaction_kwargs` choose. Raises TaskError where there is none of that name."""
        name = kwargs.get("name", DEFAULT_NAME)
        if name not in self:
            raise TaskError(f"interaction_kwargs choose {name!r}{nearest(str(name), self)}")
        return self[name]


def load_interactions(path: Path) -> Interactions:
    """The interactions of a YAML file. Raises ConfigError with one line: the file, the entry, what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    entries = document.get("interaction") if isinstance(document, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{path}: expected `interaction:` over a list of class_name, name and config"
        )
    loaded: list[LoadedInteraction] = []
    for index, entry in enumerate(entries):
        try:
            loaded.append(_load(entry, path))
        except (ConfigError, ToolConfigError) as error:
            raise ConfigError(f"{path}: entry {index}: {error}") from error
    if len({item.name for item in loaded}) < len(loaded):
        raise ConfigError(
            f"{path}: each interaction needs a name of its own, got {', '.join(item.name for item in loaded)}"
        )
    return Interactions(loaded, text)


def _load(entry: Any, path: Path) -> LoadedInteraction:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
        raise ConfigError(
            "expected class_name (package.module.Class), and name and config where needed"
        )
    config = entry.get("config") or {}
    if not isinstance(config, Mapping):
        raise ConfigError(f"config must be a mapping, got {type(config).__name__}")
    module, _, class_name = entry["class_name"].rpartition(".")
    name = entry.get("name") or class_name.removesuffix("Interaction").lower()
    timeout_s = config.get("timeout_s", DEFAULT_TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ConfigError(f"config.timeout_s must be a number above 0, got {timeout_s!r}")
    interaction_class = import_attribute(module, class_name, path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = interaction_class(config={**config, "name": name})
    except Exception as error:
        raise ConfigError(
            f"{entry['class_name']} cannot be made: {type(error).__name__}: {error}"
        ) from error
    missing = [
        step
        for step in ("start_interaction", "generate_response", "finalize_interaction")
        if not hasattr(made, step)
    ]
    if missing:
        raise ConfigError(
            f"{entry['class_name']} is no interaction: it has no {', '.join(missing)}"
        )
    return LoadedInteraction(str(name), made, float(timeout_s))


class SimulatedUser:
    """One conversation's user. Nothing here raises but for cancellation; a failure ends the user's part.

    `rewards` are those of its turns, in order, the one that ended the conversation included. `failures` say what went wrong.
    """

    def __init__(self, loaded: LoadedInteraction, kwargs: Mapping[str, Any]) -> None:
        self._loaded = loaded
        self._kwargs = dict(kwargs)
        self._instance_id: str | None = None
        self.turns = 0
        self.rewards: list[float] = []
        self.failures: list[str] = []

    async def start(self) -> None:
        """Starts the instance."""
        instance_id = self._instance_id = uuid.uuid4().hex
        await self._bounded(
            "start_interaction",
            lambda: self._loaded.interaction.start_interaction(instance_id, **self._kwargs),
        )

    async def reply(self, messages: Sequence[Message]) -> str | None:
        """What the user says to the conversation so far; None where the user is done, or failed."""
        if self.failures:
            return None
        seen = [{"role": message["role"], "content": message["content"]} for message in messages]
        return await self._bounded("generate_response", lambda: self._answer(seen))

    async def _answer(self, seen: list[dict[str, Any]]) -> str | None:
        ends, text, reward, _ = await self._loaded.interaction.generate_response(
            self._instance_id or "", seen, **self._kwargs
        )
        self.turns += 1
        if reward is not None:
            self.rewards.append(_reward(reward))
        if ends:
            return None
        if not isinstance(text, str):
            raise TypeError(f"expected the user's words as a string, got {type(text).__name__}")
        return without_lone_surrogates(text)

    async def finalize(self) -> None:
        """Ends the instance, once, whether or not it was started to the end, and if the conversation is cancelled meanwhile."""
        instance_id, self._instance_id = self._instance_id, None
        if instance_id is None:
            return
        ending = asyncio.ensure_future(
            self._bounded("finalize_interaction", lambda: self._finalized(instance_id))
        )
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait((ending,))  # bounded by its time-out
            raise

    def _finalized(self, instance_id: str) -> Awaitable[Any]:
        """verl's base class takes no argument, its own subclasses take the id."""
        finalize = self._loaded.interaction.finalize_interaction
        return finalize(instance_id) if inspect.signature(finalize).parameters else finalize()

    async def _bounded(self, step: str, begin: Callable[[], Awaitable[T]]) -> T | None:
        """What the coroutine that `begin` makes returns. That, too, may raise: a class may not take what a row gives it."""
        deadline = asyncio.timeout(self._loaded.timeout_s)
        try:
            async with deadline:
                return await begin()
        except Exception as error:
            took = (
                f"took more than {self._loaded.timeout_s:g} s"
                if deadline.expired()
                else f"failed: {describe(error)}"
            )
            self.failures.append(f"interaction {self._loaded.name}: {step} {took}")
        return None


def _reward(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)) and abs(value) < float("inf"):
        return float(value)
    raise TypeError(f"expected a finite number as the user turn's reward, got {value!r:.100}")
