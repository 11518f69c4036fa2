"""turns.jsonl: what a gateway needs to go on after it was killed.

    {"kind": "session", "name", "key", "task_id", "sample", "started_at", ...}   a session begins
    {"kind": "turn", "name", "at_s", "entry"}        a turn, before its answer leaves
    {"kind": "end", "name"}                          a session is in the run, or was given up

`key` is the SHA-256 of the session's API key; `entry` is `SessionTree.entry`: a turn's own tokens
and messages alone. Invariant: a session's lines are in order, and each turn is there once. A
resumed gateway drops the lines of sessions that ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from conversations.errors import RunFolderError
from conversations.run.store import JOURNAL


@dataclass(slots=True)
class JournaledSession:
    """A session that the journal has and that did not end: its first line, and those of turns."""

    opened: dict[str, Any]
    turns: list[dict[str, Any]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)


def line_of(kind: str, name: str, **fields: Any) -> bytes:
    """A line of the journal. Raises TypeError or ValueError if a value has no JSON form."""
    return json.dumps({"kind": kind, "name": name, **fields}, allow_nan=False).encode("ascii")


def turn_line(name: str, at_s: float, entry: Mapping[str, Any]) -> bytes:
    """The line of a turn, whose numbers were checked when they came: orjson writes NaN as null."""
    try:
        return orjson.dumps({"kind": "turn", "name": name, "at_s": at_s, "entry": entry})
    except TypeError:  # half a character in a header, or an integer of more than 64 bits
        return line_of("turn", name, at_s=at_s, entry=entry)


def read_journal(folder: Path) -> list[JournaledSession]:
    """The sessions that did not end, in the order of their beginning.

    Raises RunFolderError, with the line, if the journal is damaged.
    """
    sessions: dict[str, JournaledSession] = {}
    for number, line in _lines(folder / JOURNAL):
        try:
            event = json.loads(line)
            name = event["name"]
            if event["kind"] == "session":
                sessions[name] = JournaledSession(event)
            elif event["kind"] == "turn":
                sessions[name].turns.append(event)
            else:
                sessions.pop(name, None)
                continue
            sessions[name].lines.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{folder / JOURNAL}:{number} is damaged: {error!r}; move the file away to go on "
                "without the sessions that did not end"
            ) from error
    return list(sessions.values())


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    if file.is_file():
        with file.open("rb") as lines:
            yield from enumerate(lines, 1)
