"""A file of JSON lines beside a run's records, written whole: what was found out about them later.

The first line is about the whole, each further line about one trajectory, with the `id` and the
`sha256` of its record: a line whose `sha256` is not its record's is out of date. Such a file may
come from anybody, so a line that is no JSON object reads as an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversations.errors import RunFolderError
from conversations.run.whole_file import write_whole


def line_beside(value: Mapping[str, Any]) -> bytes:
    """A trajectory's line, with its newline. Raises ValueError for numbers that JSON has not."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def write_beside(file: Path, head: Mapping[str, Any], lines: Iterable[bytes]) -> Path:
    """Writes the file, whole or not at all, and returns its path. Raises RunFolderError."""
    if file.with_name(f"{file.name}.new").is_symlink():  # the folder may come from anybody
        raise RunFolderError(f"{file}.new is a link; remove it")
    first = json.dumps(head, allow_nan=False).encode() + b"\n"
    try:
        write_whole(file, (part for parts in ((first,), lines) for part in parts))
    except OSError as error:
        raise RunFolderError(f"{file} cannot be written: {error.strerror}") from error
    return file


def read_beside(line: bytes) -> dict[str, Any]:
    """The object of a line; an empty one if it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
