"""`scores.jsonl` beside a run's records: what an engine said when it scored their tokens again.

The first line is about the whole: the engine, the bound, the summary. Each further line is one
trajectory's:

    {"id": ..., "sha256": its record's, "differences": [a number or null for each response token]}

A difference is the recorded log-prob minus the engine's; null: not scored. No record is changed: a
line whose `sha256` is not its record's is out of date.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversations.errors import RunFolderError
from conversations.run.whole_file import write_whole

SCORES = "scores.jsonl"
DIGITS = 6
"""Decimals of a difference that are kept."""


def score_line(record_id: str, sha256: str, differences: Sequence[float | None]) -> bytes:
    """A trajectory's line, with its newline."""
    rounded = [None if value is None else round(value, DIGITS) for value in differences]
    line = {"id": record_id, "sha256": sha256, "differences": rounded}
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def write_scores(folder: Path, summary: Mapping[str, Any], lines: Iterable[bytes]) -> Path:
    """Writes the file, whole or not at all, and returns its path. Raises RunFolderError."""
    file = folder / SCORES
    if file.with_name(f"{SCORES}.new").is_symlink():  # the folder may come from anybody
        raise RunFolderError(f"{file}.new is a link; remove it")
    head = json.dumps(summary, allow_nan=False).encode() + b"\n"
    try:
        write_whole(file, (part for parts in ((head,), lines) for part in parts))
    except OSError as error:
        raise RunFolderError(f"{file} cannot be written: {error.strerror}") from error
    return file


class SavedScores:
    """The scores in a run folder, read when asked for; empty if there is no file.

    The file may come from anybody: a line that is no such line counts as absent.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / SCORES
        self._places: dict[tuple[str, str], int] = {}
        if not self._file.is_file():
            return
        place = 0
        with self._file.open("rb") as lines:
            for line in lines:
                found = _parsed(line)
                if isinstance(found.get("id"), str) and isinstance(found.get("sha256"), str):
                    self._places[found["id"], found["sha256"]] = place
                place += len(line)

    def differences(self, record: Mapping[str, Any]) -> list[float | None] | None:
        """Those of a record's response tokens, None if it has none that belong to it."""
        place = self._places.get((str(record["id"]), str(record["sha256"])))
        if place is None:
            return None
        with self._file.open("rb") as lines:
            lines.seek(place)
            found = _parsed(lines.readline()).get("differences")
        if not isinstance(found, list) or len(found) != len(record["response_ids"]):
            return None
        return found if all(map(_is_difference, found)) else None


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_difference(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))
