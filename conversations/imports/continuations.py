"""Which files of a source continue others: ATIF's `continued_trajectory_ref` names such a file.

Invariant: only files of the source are read, whatever a reference says. A .json file that holds one
foreign document may continue others and be continued. Each continues one other at most, and no
chain is a circle, so that every document is imported once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conversations.atif import OWN
from conversations.imports.files import SourceDefect, SourceDocument, documents
from conversations.upgrade import READABLE

REFERENCE = "continued_trajectory_ref"


def continuations(files: Iterable[Path]) -> dict[Path, Path]:
    """{file: the file of the source that continues it}."""
    references = {
        file: document.value.get(REFERENCE) for file in files if (document := _foreign_one(file))
    }
    known = {_plain(file): file for file in references}
    found: dict[Path, Path] = {}
    for file, named in references.items():
        later = known.get(_plain(file.parent / named)) if isinstance(named, str) else None
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


def is_own_document(value: Mapping[str, Any]) -> bool:
    """Whether turntrace wrote the document: then it is a whole record."""
    extra = value.get("extra")
    own = extra.get(OWN) if isinstance(extra, dict) else None
    return isinstance(own, dict) and own.get("schema") in READABLE


def _foreign_one(file: Path) -> SourceDocument | None:
    """The only document of a .json file; None if there are none or more, or it is our own."""
    if file.suffix != ".json":
        return None
    document = read_continuation(file)
    if isinstance(document, SourceDefect) or document.place != str(file):
        return None
    return None if is_own_document(document.value) else document


def read_continuation(file: Path) -> SourceDocument | SourceDefect:
    """The document of a file that continues another."""
    return next(documents([file]), SourceDefect(str(file), "is empty"))
