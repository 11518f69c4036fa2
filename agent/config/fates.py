"""What becomes of a key that the user set.

It works, it is refused, or it is reported as without effect: never a fourth.

What would change results is refused; what is harmless is reported. The fates of a key stand beside
it in `schema.py`, as `Annotated` metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

When = Callable[[Any], bool]
"""Asks the whole `rollout` block."""

Use = Literal["run", "agent", "gateway"]
"""Who reads the config: a run of our own loop, `run --agent`, or `turntrace gateway`."""
USES: tuple[Use, ...] = ("run", "agent", "gateway")
PROGRAMS: tuple[Use, ...] = ("agent", "gateway")
"""The uses in which the conversations are those of agent programs."""


def _always(rollout: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Refused:
    """The value cannot work: `text` says what is wrong and what to do."""

    text: str
    when: When = _always


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The key changes nothing in these `uses`: `reason` says why."""

    reason: str
    when: When = _always
    uses: tuple[Use, ...] = USES


@dataclass(frozen=True, slots=True)
class Warned:
    """The key works, and its value is probably not meant: `text` gets the `rollout` block."""

    text: Callable[[Any], str]
    when: When


@dataclass(frozen=True, slots=True)
class Switch:
    """The key turns its section on: the section's fate is not its own."""


@dataclass(frozen=True, slots=True)
class Inside:
    """Fates of keys in a mapping that has no table of its own."""

    keys: Mapping[str, Refused | NoEffect]


Fate = Refused | NoEffect | Warned | Switch
Fates = dict[str, list[Fate]]


def fates_of(section: type[BaseModel], prefix: str = "") -> Fates:
    """The fates of every key of a section by dotted path, in the order of the table."""
    fates: Fates = {}
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        fates[path] = [fate for fate in info.metadata if isinstance(fate, Fate)]
        for inside in info.metadata:
            if isinstance(inside, Inside):
                fates |= {f"{path}.{key}": [fate] for key, fate in inside.keys.items()}
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            fates |= fates_of(info.annotation, f"{path}.")
    return fates


def refusals(fates: Fates, rollout: Any) -> Iterator[tuple[str, str]]:
    """(path under `rollout`, what is wrong and what to do) of every value that cannot work."""
    for path, several in fates.items():
        for fate in several:
            if isinstance(fate, Refused) and fate.when(rollout):
                yield path, fate.text


def notices(fates: Fates, rollout: Any, given: Iterable[str], use: Use = "run") -> list[str]:
    """Warnings, then one line for each reason why given keys have no effect in this use.

    `given` are dotted paths under `rollout`.
    """
    paths_by_reason: dict[str, list[str]] = {}
    for path in given:
        if reason := _no_effect(fates, rollout, path, use):
            paths_by_reason.setdefault(reason, []).append(f"rollout.{path}")
    warnings = [
        fate.text(rollout)
        for several in fates.values()
        for fate in several
        if isinstance(fate, Warned) and fate.when(rollout)
    ]
    return [
        *warnings,
        *(f"no effect: {', '.join(paths)}: {why}" for why, paths in paths_by_reason.items()),
    ]


def _no_effect(fates: Fates, rollout: Any, path: str, use: Use) -> str | None:
    """Why a key has no effect: its own reason, else that of the section around it.

    None if it works.
    """
    while path:
        for fate in fates.get(path, ()):
            if isinstance(fate, NoEffect) and use in fate.uses and fate.when(rollout):
                return fate.reason
        if any(isinstance(fate, Switch) for fate in fates.get(path, ())):
            return None
        path = path.rpartition(".")[0]
    return None
