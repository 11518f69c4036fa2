"""An --out that a recipe's command goes on in: it must hold that run, or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from agent.errors import ConfigError


def check_same(folder: Path, before: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raises ConfigError, naming what differs, if the run in a folder has other settings."""
    differing = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
    if differing:
        said = ", ".join(
            f"{name} {before.get(name)} (now {wanted.get(name)})" for name in differing
        )
        raise ConfigError(
            f"{folder} holds a run with other settings: {said}; give the same, or another --out"
        )


def check_unused(folder: Path, leavings: Collection[str]) -> None:
    """Raises ConfigError if the folder holds anything but what a killed start leaves."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --out")
    names = {one.name for one in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(names.difference(leavings)):
        raise ConfigError(
            f"{folder} holds no run of this recipe, but {others[0]}; choose another --out"
        )
