"""The documents of a source: a .json file holds one or a list, a .jsonl file one a line.

A folder holds any number of such files. Sources are untrusted: sizes have limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.errors import ImportFileError

MAX_BYTES = 256 << 20
"""The longest document that is read: a million tokens with log-probs take some 40 MB."""
SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One JSON object and its place: `file:line`, `file[index]` in a list, or the file alone."""

    place: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SourceDefect:
    """A place that holds no document, and why."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def source_files(source: Path) -> list[Path]:
    """The files to read, by name. Raises ImportFileError if there are none."""
    if source.is_dir():
        files = sorted(
            file for file in source.rglob("*") if file.suffix in SUFFIXES and file.is_file()
        )
        if not files:
            raise ImportFileError(f"{source}: holds no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not source.is_file():
        raise ImportFileError(f"{source}: there is no such file")
    if source.suffix not in SUFFIXES:
        raise ImportFileError(f"{source}: a file to import ends in {', '.join(SUFFIXES)}")
    return [source]


def documents(files: list[Path]) -> Iterator[SourceDocument | SourceDefect]:
    """Every document, one in memory at a time."""
    for file in files:
        try:
            yield from _whole(file) if file.suffix == ".json" else _lines(file)
        except OSError as error:
            yield SourceDefect(str(file), f"cannot be read: {error.strerror}")


def _whole(file: Path) -> Iterator[SourceDocument | SourceDefect]:
    if (size := file.stat().st_size) > MAX_BYTES:
        yield SourceDefect(str(file), f"is {size} bytes, more than {MAX_BYTES}")
    else:
        yield from _documents(str(file), file.read_bytes())


def _lines(file: Path) -> Iterator[SourceDocument | SourceDefect]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                yield SourceDefect(
                    f"{file}:{number}",
                    f"the line is longer than {MAX_BYTES} bytes; nothing behind it was read",
                )
                return
            if line.strip():
                yield from _documents(f"{file}:{number}", line)


def _documents(place: str, text: bytes) -> Iterator[SourceDocument | SourceDefect]:
    """The document in a text, or each one of a list."""
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        yield SourceDefect(place, f"is not a JSON document: {error}")
        return
    if isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield _document(f"{place}[{index}]", item)
    else:
        yield _document(place, value)


def _document(place: str, value: Any) -> SourceDocument | SourceDefect:
    if isinstance(value, dict):
        return SourceDocument(place, value)
    return SourceDefect(
        place, f"is a JSON {type(value).__name__}, expected an object or a list of them"
    )


def _refuse(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number in JSON")
