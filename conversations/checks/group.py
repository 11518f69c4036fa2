"""What only a run as a whole can tell: nothing twice, groups whole and alike, run.json's counts those of the records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from conversations.checks.finding import Defect, Finding, differs
from conversations.checks.record import Checked, differing_fields

COUNTED = ("done", "turns", "sampled_tokens", "tool_calls", "tool_errors", "invalid_calls", "infra_errors")
"""What run.json counts, but for stop reasons and the mean reward."""
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Member:
    """A finished trajectory in its group: its line, and the digests of what it must share with the others."""

    sample: int
    line: int
    common: bytes


@dataclass(slots=True)
class Whole:
    """Every record's key and the sums over all of them; memory grows by some 400 bytes a trajectory."""

    groups: dict[str, list[Member]] = field(default_factory=dict)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)
    unreadable: int = 0
    partial: int = 0

    def add(self, file: str, line: int, checked: Checked, *, finished: bool) -> Iterator[Finding]:
        """Takes note of a record; yields what is wrong with it beside the others."""
        self.partial += checked.partial
        if checked.key is None:
            self.unreadable += finished
            return
        if not finished:
            return  # it may have been cut off again, or have ended since: a run that was killed has not tidied up
        first = self.places.setdefault(checked.key, line)
        if first != line:
            yield Finding(f"sample {checked.key[1]} of this task stands already at {file}:{first}")
            return
        self.groups.setdefault(checked.key[0], []).append(Member(checked.key[1], line, checked.common))
        self.tally += checked.tally
        if checked.reward is not None:
            self.rewards.append(checked.reward)

    def defects(self, file: str, manifest: dict[str, Any], n: int | None) -> Iterator[Defect]:
        """What is wrong with groups and counts, once every record was added."""
        for task_id, members in self.groups.items():
            yield from _unlike(file, task_id, members)
            if n is not None and self.is_complete(manifest):
                yield from _missing(file, task_id, members, n)
        yield from (Defect("run.json", 0, None, finding) for finding in self._count_findings(manifest))

    def is_complete(self, manifest: dict[str, Any]) -> bool:
        """Whether the run says that it did all that was asked for."""
        counts = _counts(manifest)
        return not _is_selective(manifest) and counts.get("asked") is not None and counts.get("asked") == counts.get("done")

    def _count_findings(self, manifest: dict[str, Any]) -> Iterator[Finding]:
        counts, done = _counts(manifest), self.tally["done"] + self.unreadable
        asked = counts.get("asked")
        if not counts or partly(manifest):
            return
        if not _is_selective(manifest) and isinstance(asked, int) and (done > asked or (self.is_complete(manifest) and done < asked)):
            yield Finding(differs("the number of finished trajectories", done, asked) + ", all that were asked for")
        if counts.get("done") != done or self.unreadable:
            return  # the counts are those of an earlier stop, or damaged lines are missing in ours
        for name in COUNTED:
            if name in counts and counts[name] != self.tally[name]:
                yield Finding(differs(f"counts.{name}, against the records", counts[name], self.tally[name]))
        yield from self._stop_reason_findings(counts.get("stop_reasons"))
        yield from self._reward_findings(counts.get("mean_reward"))

    def _stop_reason_findings(self, counted: object) -> Iterator[Finding]:
        ours = {name.partition(".")[2]: count for name, count in self.tally.items() if name.startswith("stop_reasons.")}
        if isinstance(counted, dict) and counted != ours:
            yield Finding(differs("counts.stop_reasons, against the records", counted, ours))

    def _reward_findings(self, mean: object) -> Iterator[Finding]:
        ours = math.fsum(self.rewards) / len(self.rewards) if self.rewards else None
        if isinstance(mean, (int, float)) and (ours is None or not math.isclose(mean, ours, rel_tol=1e-6, abs_tol=1e-6)):
            yield Finding(differs("counts.mean_reward, against the records", mean, ours))


def _is_selective(manifest: dict[str, Any]) -> bool:
    """Whether the run did not ask for all of every group: the first tasks alone, or whoever of all was done first."""
    config = manifest.get("config")
    rollout = config.get("rollout") if isinstance(config, dict) else None
    return manifest.get("limit") is not None or bool(isinstance(rollout, dict) and rollout.get("over_sample_rate"))


def partly(manifest: dict[str, Any]) -> str | None:
    """Why a run may be over without all samples of all tasks; None where it may not."""
    if manifest.get("limit") is not None:
        return "--limit"
    config = manifest.get("config")
    rollout = config.get("rollout") if isinstance(config, dict) else None
    return "over_sample_rate" if isinstance(rollout, dict) and rollout.get("over_sample_rate") else None


def _counts(manifest: dict[str, Any]) -> dict[str, Any]:
    counts = manifest.get("counts")
    return counts if isinstance(counts, dict) else {}


def _unlike(file: str, task_id: str, members: list[Member]) -> Iterator[Defect]:
    """The samples that do not share with most of their group what all samples of a task share."""
    commons = Counter(member.common for member in members if member.common)
    if len(commons) < 2:
        return
    usual = commons.most_common(1)[0][0]
    for member in members:
        if member.common not in (b"", usual):
            names = ", ".join(differing_fields(member.common, usual))
            other = next(each for each in members if each.common == usual)
            what = f"{names}: not as in the group's other samples (sample {other.sample}, line {other.line})"
            yield Defect(file, member.line, f"{task_id}-{member.sample}", Finding(what))


def _missing(file: str, task_id: str, members: list[Member], n: int) -> Iterator[Defect]:
    there = {member.sample for member in members}
    missing = [sample for sample in range(min(n, len(there) + _SHOWN)) if sample not in there]
    if len(there) < n:
        what = f"the group of task {task_id} has {len(there)} of {n} samples, missing: {', '.join(map(str, missing[:_SHOWN]))}"
        yield Defect(file, 0, f"{task_id}-{missing[0]}", Finding(what))
