"""The installed packages that programs may import: those asked for and what they require.

They are visible read-only in a folder of their own, which PYTHONPATH names inside the sandbox;
nothing that is installed beside them is visible.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tools.base import ToolConfigError
from tools.extras import require

if TYPE_CHECKING:
    from packaging.requirements import Requirement

INSIDE = "/opt/packages"


@dataclass(frozen=True, slots=True)
class Shown:
    """A file or folder of a package: `path` below `root`, a folder of installed packages."""

    root: str
    path: str


def shown(names: Iterable[str]) -> list[Shown]:
    """What has to be visible for these packages to be imported.

    Raises ToolConfigError, which names a package that is not installed.
    """
    if not (names := list(names)):
        return []
    require("packaging", extra="sandbox")
    return [entry for package in _required(names) for entry in _entries_of(package)]


def _required(names: Iterable[str]) -> list[Distribution]:
    """The packages, and the installed ones that they require; extras only if they are asked for."""
    from packaging.utils import canonicalize_name

    packages: dict[str, Distribution] = {}
    waiting = [(_requirement(name), True) for name in names]
    while waiting:
        requirement, is_requested = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in packages:
            continue
        try:
            packages[name] = distribution(requirement.name)
        except PackageNotFoundError as error:
            if is_requested:
                raise ToolConfigError(
                    f"the package {requirement.name!r} is not installed here; pip install it, "
                    "or leave it out"
                ) from error
            continue
        waiting += [(needed, False) for needed in _needed_by(packages[name], requirement.extras)]
    return list(packages.values())


def _requirement(name: str) -> Requirement:
    from packaging.requirements import Requirement

    try:
        return Requirement(name)
    except ValueError as error:
        raise ToolConfigError(
            f"{name!r} is not the name of a package: {str(error).splitlines()[0]}"
        ) from error


def _needed_by(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    for line in package.requires or ():
        requirement = _requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")
        ):
            yield requirement


def _entries_of(package: Distribution) -> Iterator[Shown]:
    root = Path(str(package.locate_file("")))
    files = [
        PurePosixPath(file)
        for file in package.files or ()
        if ".." not in file.parts and "__pycache__" not in file.parts
    ]
    if not files or '"editable": true' in (package.read_text("direct_url.json") or ""):
        raise ToolConfigError(
            f"the package {package.name!r} is not installed as files of its own, so it cannot be "
            "shown; install it as a wheel"
        )
    for path in _fewest_paths(root, files, PurePosixPath()):
        yield Shown(os.path.realpath(root), str(path))


def _fewest_paths(
    root: Path, files: list[PurePosixPath], folder: PurePosixPath
) -> Iterator[PurePosixPath]:
    """The fewest paths that hold these files and no others.

    A folder that several packages share is not shown whole.
    """
    depth = len(folder.parts)
    for name in sorted({file.parts[depth] for file in files}):
        path, below = folder / name, [file for file in files if file.parts[depth] == name]
        own = {file.parts[depth + 1] for file in below if len(file.parts) > depth + 1}
        if own and set(os.listdir(root / path)) - {"__pycache__"} - own:
            yield from _fewest_paths(root, below, path)
        elif (root / path).exists():
            yield path
