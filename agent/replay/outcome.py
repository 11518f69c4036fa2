"""How each trajectory of a replay compares: one JSON line in the new run's `replay.jsonl`.

The line is written before the trajectory itself.

Invariant: a trajectory that is on disk has its line. The last line of an id counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agent.loop.conversation import Conversation
from agent.replay.compare import (
    Answers,
    Scope,
    answer_difference,
    compare_records,
    compared_answers,
    logprob_difference,
)
from agent.replay.tools import LiveTools
from conversations.errors import RunFolderError
from conversations.run.hash_store import HashStore
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory

REPLAY = "replay.jsonl"
IDENTICAL, DIVERGED, FAILED = "identical", "diverged", "failed"

Line = dict[str, Any]
"""`id`, `parent` (its id), `outcome`, `first` (a Divergence or null), `answers` ({tool: compared,
different, fields}), `elsewhere` (answers that differ outside of the record: while state was
rebuilt, or after the record's end), `logprob_difference`.
"""


def outcome(
    recorded: Trajectory, replayed: Trajectory, scope: Scope, tools: LiveTools | None
) -> Line:
    """The line of a trajectory: its record beside its parent's, and the calls made beside both."""
    first = compare_records(recorded, replayed, scope)
    failed = replayed.infra_error and not recorded.infra_error
    return {
        "id": replayed.id,
        "parent": recorded.id,
        "outcome": FAILED if failed else DIVERGED if first else IDENTICAL,
        "first": dataclasses.asdict(first) if first else None,
        "answers": _answers(recorded, replayed, tools) if scope.live_tools else {},
        "elsewhere": tools.differences if tools else [],
        "logprob_difference": logprob_difference(recorded, replayed) if scope.live_model else None,
        "error": replayed.error if failed else None,
    }


def _answers(
    recorded: Trajectory, replayed: Trajectory, tools: LiveTools | None
) -> dict[str, dict[str, Any]]:
    counts: dict[str, Answers] = {}
    again = tools.asked_again if tools else []
    beside = {old.call_id for old, _ in again}
    own = [
        pair
        for pair in compared_answers(recorded, replayed)
        if pair[0].call_id not in beside and pair[0].attempts
    ]
    for old, new in [*own, *again]:
        counts.setdefault(old.name, Answers()).count(answer_difference(old, new))
    return {name: dataclasses.asdict(each) for name, each in counts.items()}


class ComparingStore:
    """A run folder that compares every trajectory with its parent before writing it."""

    def __init__(
        self, folder: RunFolder, scope: Scope, lines: IO[str], tell: Callable[[Line], None]
    ) -> None:
        self.done = folder.done
        self._folder = folder
        self._scope = scope
        self._lines = lines
        self._tell = tell
        self._running: dict[str, tuple[Trajectory, Conversation]] = {}

    def watched(self, replays: Iterable[tuple[Trajectory, Conversation]]) -> Iterator[Conversation]:
        """The conversations, remembered with what they replay until they are on disk."""
        for record, conversation in replays:
            self._running[f"{conversation.task.id}-{conversation.sample}"] = record, conversation
            yield conversation

    def keep_evidence(self, data: bytes) -> None:
        """Writes the evidence file of a conversation whose rest was sampled anew."""
        self._folder.keep_evidence(data)

    def append(self, trajectory: Trajectory) -> None:
        """Compares, notes, and writes a finished conversation."""
        trajectory.to_line()  # what has no JSON form is refused before anything is noted
        record, conversation = self._running[trajectory.id]
        tools = conversation.tools if isinstance(conversation.tools, LiveTools) else None
        line = outcome(record, trajectory, self._scope, tools)
        self._note(line)
        self._folder.append(trajectory)
        del self._running[trajectory.id]
        self._tell(line)

    def _note(self, line: Line) -> None:
        try:
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        except OSError as error:
            raise RunFolderError(
                f"{self._folder.path / REPLAY} cannot be written: {error.strerror}; "
                "make room and --resume"
            ) from error

    def image_store(self, trajectory: Trajectory) -> HashStore:
        """Where the conversation's images are kept."""
        return self._folder.image_store(trajectory)

    def append_unfinished(self, trajectory: Trajectory) -> None:
        """Writes what there is of a conversation that was cut off."""
        self._folder.append_unfinished(trajectory)


def earlier_lines(out: Path, ids: Iterable[str], compared: Callable[[str], Line]) -> list[Line]:
    """The lines of the trajectories that a resumed replay already has; the file keeps only these.

    `compared` makes a missing line from the two records; differences outside of them are lost.
    """
    written: dict[str, Line] = {}
    if (out / REPLAY).exists():
        for text in (out / REPLAY).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(
                ValueError, TypeError, KeyError
            ):  # torn by a kill: its trajectory was not written either
                line = json.loads(text)
                written[line["id"]] = line
    kept = [written.get(name) or compared(name) for name in ids]
    (out / REPLAY).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


@dataclass(slots=True)
class Tally:
    """The counts of a replay. `diverged` keeps the lines of all that is not identical."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Answers] = field(default_factory=dict)
    diverged: list[Line] = field(default_factory=list)
    rebuilt_otherwise: int = 0
    logprob_difference: float | None = None

    def add(self, line: Line) -> None:
        """Counts one trajectory."""
        self.outcomes[line["outcome"]] += 1
        if line["first"]:
            self.kinds[line["first"]["kind"]] += 1
        if line["outcome"] != IDENTICAL or line["elsewhere"]:
            self.diverged.append(line)
        self.rebuilt_otherwise += bool(line["elsewhere"])
        for name, counted in line["answers"].items():
            total = self.answers.setdefault(name, Answers())
            total.compared += counted["compared"]
            total.different += counted["different"]
            total.fields += [each for each in counted["fields"] if each not in total.fields]
        if line["logprob_difference"] is not None:
            self.logprob_difference = max(
                self.logprob_difference or 0.0, line["logprob_difference"]
            )
