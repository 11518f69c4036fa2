"""One thing that is wrong with a record, in one line: where, what, found, expected.

Invariant: the line can be printed on a terminal, whatever the record holds: values are cut, and
escaped if they do not print.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 60
LONGEST_ID = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and where. `turn` counts generations from 0, `token` counts from the first
    prompt id.

    Both are None if the finding has no such place.
    """

    what: str
    turn: int | None = None
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Defect:
    """A finding and its file, line and trajectory.

    `line` counts from 1, 0 stands for the whole file. `trajectory` is None if the line has no id.
    """

    file: str
    line: int
    trajectory: str | None
    finding: Finding

    def __str__(self) -> str:
        place = [f"{self.file}:{self.line}" if self.line else self.file]
        if self.trajectory is not None:
            place += ["trajectory", printable(self.trajectory[:LONGEST_ID])]
        if self.finding.turn is not None:
            place += ["turn", str(self.finding.turn)]
        if self.finding.token is not None:
            place += ["token", str(self.finding.token)]
        return f"{' '.join(place)}: {self.finding.what}"

    def as_json(self) -> dict[str, Any]:
        """The defect as one JSON object."""
        finding = self.finding
        place = {"file": self.file, "line": self.line, "trajectory": self.trajectory}
        return {**place, "turn": finding.turn, "token": finding.token, "what": finding.what}


def differs(what: str, found: object, expected: object) -> str:
    """The end of every line that compares two values."""
    return f"{what}, found {quoted(found)}, expected {quoted(expected)}"


def quoted(value: object) -> str:
    """A value as JSON, cut, on one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(type(value).__name__)
    return printable(
        text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
    )


def show_difference(found: str, expected: str) -> str:
    """Two texts, from shortly before their first different character."""
    start = max(0, first_difference(found, expected) - 12)
    return f"found {_from(found, start)}, expected {_from(expected, start)}"


def _from(text: str, start: int) -> str:
    piece = text[start : start + _SHOWN]
    before, after = "..." if start else "", "..." if start + _SHOWN < len(text) else ""
    return f"{before}{printable(json.dumps(piece, ensure_ascii=False))}{after}"


def printable(text: str) -> str:
    """The text, escaped if a terminal would not print it as it stands."""
    return (
        text
        if text.isprintable()
        else text.encode("unicode_escape", "backslashreplace").decode("ascii")
    )


def first_difference(found: Sequence[Any], expected: Sequence[Any]) -> int:
    """The first index at which two sequences differ, the shorter length if one begins with the
    other.
    """
    return next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )


def first_of(indices: Iterable[int], say: Callable[[int], Finding]) -> Iterator[Finding]:
    """The finding for the first index, with the number of further ones.

    One finding for each token would flood the output.
    """
    found = list(indices)
    if found:
        first = say(found[0])
        more = f" (and {len(found) - 1} more tokens)" if len(found) > 1 else ""
        yield Finding(first.what + more, first.turn, first.token)
