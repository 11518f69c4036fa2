"""The checks that need all records: no sample twice, groups complete and consistent."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from conversations.checks.counts import Counts
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Defect, Finding
from conversations.checks.record import LineResult, differing_fields

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Member:
    """A finished trajectory in its group: its line, and digests of what a group must share."""

    sample: int
    line: int
    common: bytes


@dataclass(slots=True)
class RunChecks:
    """The keys of all records and the sums over them, some 400 bytes a trajectory."""

    groups: dict[str, list[Member]] = field(default_factory=dict)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    unreadable: int = 0
    partial: int = 0
    unproven: int = 0

    def add(self, file: str, line: int, result: LineResult, *, finished: bool) -> Iterator[Finding]:
        """Adds a record. Yields what is wrong with it in the context of the others."""
        self.partial += result.partial
        self.unproven += result.unproven
        if result.key is None:
            self.unreadable += finished
            return
        if not finished:
            return  # after a kill it may be there twice, or among the finished ones as well
        first = self.places.setdefault(result.key, line)
        if first != line:
            yield Finding(f"sample {result.key[1]} of this task stands already at {file}:{first}")
            return
        self.groups.setdefault(result.key[0], []).append(Member(result.key[1], line, result.common))
        self.tally += result.tally
        self.digest.update(result.sha256.encode())
        if result.reward is not None:
            self.rewards.append(result.reward)

    @property
    def finished(self) -> int:
        """The number of lines of finished trajectories, damaged ones included."""
        return self.tally["done"] + self.unreadable

    def defects(self, file: str, counts: Counts, facts: RunFacts) -> Iterator[Defect]:
        """Defects of groups and counts, after every record was added."""
        n = facts.n
        for task_id, members in self.groups.items():
            if facts.imported is None:
                yield from _unlike(file, task_id, members)
            if n is not None and counts.is_complete(self.finished):
                yield from _missing(file, task_id, members, n)
        if not self.unreadable:
            yield from (
                Defect("run.json", 0, None, finding)
                for finding in counts.findings(self.finished, self.tally, self.rewards)
            )


def _unlike(file: str, task_id: str, members: list[Member]) -> Iterator[Defect]:
    """The samples that differ from most of their group in what all samples of a task share."""
    commons = Counter(member.common for member in members if member.common)
    if len(commons) < 2:
        return
    usual = commons.most_common(1)[0][0]
    for member in members:
        if member.common not in (b"", usual):
            names = ", ".join(differing_fields(member.common, usual))
            other = next(each for each in members if each.common == usual)
            what = (
                f"{names}: not as in the group's other samples "
                f"(sample {other.sample}, line {other.line})"
            )
            yield Defect(file, member.line, f"{task_id}-{member.sample}", Finding(what))


def _missing(file: str, task_id: str, members: list[Member], n: int) -> Iterator[Defect]:
    there = {member.sample for member in members}
    missing = [sample for sample in range(min(n, len(there) + _SHOWN)) if sample not in there]
    if len(there) < n:
        shown = ", ".join(map(str, missing[:_SHOWN]))
        what = f"the group of task {task_id} has {len(there)} of {n} samples, missing: {shown}"
        yield Defect(file, 0, f"{task_id}-{missing[0]}", Finding(what))
