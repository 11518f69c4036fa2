"""User turns taken by a program: verl's interactions, from the YAML of `interaction_config_path`.

A turn without a tool call is answered by the interaction that the row's `interaction_kwargs`
choose: with a user message, or with the end of the conversation. The contract is verl 0.6.1's
(`verl/interactions/base.py`): `start_interaction(instance_id, **kwargs)`,
`generate_response(instance_id, messages, **kwargs) -> (ends, text, reward, metrics)`,
`finalize_interaction(instance_id)`. Each conversation has an instance of its own, finalized on
every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import pydantic
import yaml

from agent.errors import ConfigError, TaskError
from agent.loop.boundary import CallTimeoutError, bounded, describe, finite
from conversations.encoding import without_lone_surrogates
from conversations.messages import Message, content_text
from conversations.warning import RecordWarning
from tools.base import ToolConfigError
from tools.reading import nearest
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


STEPS = ("start_interaction", "generate_response", "finalize_interaction")


@dataclass(frozen=True, slots=True)
class LoadedInteraction:
    """An interaction by name. `timeout_s` bounds each of its coroutines."""

    name: str
    interaction: Interaction
    timeout_s: float


class Interactions(dict[str, LoadedInteraction]):
    """All interactions of a run, by name. `source_text` is the YAML they came from."""

    def __init__(self, loaded: Sequence[LoadedInteraction], source_text: str) -> None:
        super().__init__((item.name, item) for item in loaded)
        self.source_text = source_text

    def chosen(self, kwargs: Mapping[str, Any]) -> LoadedInteraction:
        """The interaction that a row's `interaction_kwargs` choose. Raises TaskError if unknown."""
        name = kwargs.get("name", DEFAULT_NAME)
        if name not in self:
            raise TaskError(f"interaction_kwargs choose {name!r}{nearest(str(name), self)}")
        return self[name]


# ---------------------------------------------------------------------- the YAML


class _Config(pydantic.BaseModel):
    """An entry's `config`: the key that is ours; all others are the interaction's."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    timeout_s: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] = DEFAULT_TIMEOUT_S


class _Entry(pydantic.BaseModel):
    """One interaction: its class, and the name that rows choose it by."""

    model_config = pydantic.ConfigDict(strict=True)

    class_name: str
    name: str | None = None
    config: _Config | None = None


class _File(pydantic.BaseModel):
    """The whole file, as verl writes it."""

    interaction: Annotated[list[_Entry], pydantic.Field(min_length=1)]


def load_interactions(path: Path) -> Interactions:
    """The interactions of a YAML file, each constructed once.

    Raises ConfigError with one line: the file, the entry, what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        entries = _File.model_validate(document).interaction
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_mistake(error)}") from error
    loaded: list[LoadedInteraction] = []
    for index, entry in enumerate(entries):
        try:
            loaded.append(_load(entry, path))
        except (ConfigError, ToolConfigError) as error:
            raise ConfigError(f"{path}: interaction.{index}: {error}") from error
    names = [item.name for item in loaded]
    if len({*names}) < len(names):
        raise ConfigError(f"{path}: each interaction needs its own name, got {', '.join(names)}")
    return Interactions(loaded, text)


def _mistake(error: pydantic.ValidationError) -> str:
    """The first mistake, in one line: the key, what is wrong, what the file should hold."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    expected = "a list `interaction:` of class_name (package.module.Class), name and config"
    return f"{where}: {first['msg']}, got {first['input']!r:.80}; expected {expected}"


def _load(entry: _Entry, path: Path) -> LoadedInteraction:
    module, _, class_name = entry.class_name.rpartition(".")
    name = entry.name or class_name.removesuffix("Interaction").lower()
    config = entry.config or _Config()
    interaction_class = import_attribute(module, class_name, path)
    given = config.model_dump(exclude_unset=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = interaction_class(config={**given, "name": name})
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{entry.class_name} cannot be constructed: {reason}") from error
    missing = [step for step in STEPS if not hasattr(made, step)]
    if missing:
        raise ConfigError(f"{entry.class_name} is no interaction: it has no {', '.join(missing)}")
    return LoadedInteraction(name, made, config.timeout_s)


# ---------------------------------------------------------------------- one conversation's user


class SimulatedUser:
    """One conversation's user. It raises only cancellation; a failure ends the user's part.

    `turns` counts the answers. `rewards` are those of the user's turns in order, the one that
    ended the conversation included. `failures` say what went wrong.
    """

    def __init__(self, loaded: LoadedInteraction, kwargs: Mapping[str, Any]) -> None:
        self._loaded = loaded
        self._kwargs = dict(kwargs)
        self._instance_id: str | None = None
        self.turns = 0
        self.rewards: list[float] = []
        self.failures: list[str] = []
        self.warnings: list[RecordWarning] = []

    async def start(self) -> None:
        """Starts the instance."""
        instance_id = self._instance_id = uuid.uuid4().hex
        await self._bounded(
            "start_interaction",
            lambda: self._loaded.interaction.start_interaction(instance_id, **self._kwargs),
        )

    async def reply(self, messages: Sequence[Message]) -> str | None:
        """What the user says to the conversation so far; None if the user is content, or failed."""
        if self.failures:
            return None
        seen = [
            {"role": message["role"], "content": content_text(message["content"])}
            for message in messages
        ]
        instance_id = self._instance_id or ""
        return await self._bounded(
            "generate_response",
            lambda: self._loaded.interaction.generate_response(instance_id, seen, **self._kwargs),
            self._read,
        )

    def _read(self, answer: tuple[bool, str, Any, Any]) -> str | None:
        """Notes the reward of an answer that came in time; returns what the user says."""
        ends, text, reward, _ = answer
        self.turns += 1
        if reward is not None:
            self.rewards.append(finite(reward))
        if ends:
            return None
        if not isinstance(text, str):
            raise TypeError(f"expected the user's words as a string, got {type(text).__name__}")
        return without_lone_surrogates(text)

    async def finalize(self, within_s: float = math.inf) -> None:
        """Ends the instance, once, within `within_s`, whether or not its start succeeded."""
        instance_id, self._instance_id = self._instance_id, None
        if instance_id is None:
            return
        ending = asyncio.ensure_future(
            self._bounded(
                "finalize_interaction", lambda: self._finalized(instance_id), within_s=within_s
            )
        )
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait((ending,))  # bounded by its timeout
            raise

    def _finalized(self, instance_id: str) -> Awaitable[Any]:
        """verl's base class takes no argument, its own subclasses take the id."""
        finalize = self._loaded.interaction.finalize_interaction
        return finalize(instance_id) if inspect.signature(finalize).parameters else finalize()

    async def _bounded(
        self,
        step: str,
        begin: Callable[[], Awaitable[T]],
        read: Callable[[T], str | None] = lambda result: None,
        within_s: float = math.inf,
    ) -> str | None:
        """What `read` makes of the coroutine's result; None, and a failure, if either fails."""
        timeout_s = min(self._loaded.timeout_s, within_s)
        try:
            return read(await bounded(begin, timeout_s))
        except CallTimeoutError:
            reason = f"took more than {timeout_s:g} s"
        except Exception as error:
            reason = f"failed: {describe(error)}"
        self.failures.append(f"interaction {self._loaded.name}: {step} {reason}")
        return None
