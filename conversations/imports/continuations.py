"""Which files of a source continue others: ATIF's `continued_trajectory_ref` names such a file.

Invariant: only files of the source are read, whatever a reference says. Each file continues one
other at most, and no chain is a circle, so that every file is imported once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from conversations.imports.files import SourceDefect, SourceDocument, documents

REFERENCE = "continued_trajectory_ref"


def continuations(files: Iterable[Path]) -> dict[Path, Path]:
    """{file: the file of the source that continues it}."""
    known = {_plain(file): file for file in files}
    found: dict[Path, Path] = {}
    for file in known.values():
        named = _reference(file)
        later = known.get(_plain(file.parent / named)) if named else None
        if later is None or later in found.values() or file in (later, *chain(found, later)):
            continue
        found[file] = later
    return found


def chain(found: Mapping[Path, Path], file: Path) -> Iterator[Path]:
    """The files that continue `file`, in order."""
    while later := found.get(file):
        yield later
        file = later


def _plain(file: Path) -> str:
    return os.path.normpath(file)


def _reference(file: Path) -> str | None:
    """What the only document of a file says, None if it says nothing that can be read."""
    if file.suffix != ".json":
        return None
    for document in documents([file]):
        if isinstance(document, SourceDefect) or document.place != str(file):
            return None
        named = document.value.get(REFERENCE)
        return named if isinstance(named, str) else None
    return None


def read_continuation(file: Path) -> SourceDocument | SourceDefect:
    """The document of a file that continues another."""
    return next(iter(documents([file])))
