"""`scores.jsonl` beside a run's records: what an engine said when it scored their tokens again.

The first line is about the whole: the engine, the bound, the summary. Each further line is one
trajectory's:

    {"id": ..., "sha256": its record's, "differences": [a number or null for each response token],
     "branches": [[the same for each of a branch's own response tokens], ...]}

A difference is the recorded log-prob minus the engine's; null: not scored. No record is changed: a
line whose `sha256` is not its record's is out of date.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversations.run.beside import line_beside, read_beside, write_beside

SCORES = "scores.jsonl"
DIGITS = 6
"""Decimals of a difference that are kept."""


def score_line(
    record_id: str,
    sha256: str,
    differences: Sequence[float | None],
    *branches: Sequence[float | None],
) -> bytes:
    """A trajectory's line, with its newline: the trunk's differences, and those of its branches."""
    line = {"id": record_id, "sha256": sha256, "differences": _rounded(differences)}
    return line_beside({**line, "branches": list(map(_rounded, branches))} if branches else line)


def _rounded(differences: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, DIGITS) for value in differences]


def write_scores(folder: Path, summary: Mapping[str, Any], lines: Iterable[bytes]) -> Path:
    """Writes the file, whole or not at all, and returns its path. Raises RunFolderError."""
    return write_beside(folder / SCORES, summary, lines)


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
                found = read_beside(line)
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
            found = read_beside(lines.readline()).get("differences")
        if not isinstance(found, list) or len(found) != len(record["response_ids"]):
            return None
        return found if all(map(_is_difference, found)) else None


def _is_difference(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))
