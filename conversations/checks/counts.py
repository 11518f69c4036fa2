"""The counts that run.json got when the run was closed, against the records.

run.json holds no counts while a run is in progress or after it was killed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conversations.checks.finding import Finding, differs

SUMMED = ("turns", "sampled_tokens", "tool_calls", "tool_errors", "invalid_calls", "infra_errors")


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a run.json. `asked` and `done` are None if the run was not closed.

    With `fewer` or `over_samples` the run did not ask for all samples of all groups. `fewer`: it
    was limited, or resumed by force with other tasks or another number of samples.
    """

    values: dict[str, Any]
    asked: int | None
    done: int | None
    fewer: bool
    over_samples: bool

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Counts:
        """The counts in a run.json, whatever else it holds."""
        values, config = (
            found if isinstance(found := manifest.get(key), dict) else {}
            for key in ("counts", "config")
        )
        rollout = config.get("rollout")
        asked, done = (
            value if type(value := values.get(key)) is int else None for key in ("asked", "done")
        )
        over_samples = isinstance(rollout, dict) and bool(rollout.get("over_sample_rate"))
        fewer = manifest.get("limit") is not None or _asked_otherwise(manifest)
        return cls(values, asked, done, fewer, over_samples)

    def is_complete(self, here: int) -> bool:
        """Whether every task that is there must have all its samples.

        A limit may have been set after a larger run was stopped, or other tasks given.
        """
        return (
            self.done is not None
            and self.asked == self.done
            and not self.over_samples
            and (not self.fewer or here == self.done)
        )

    def findings(self, here: int, tally: Counter[str], rewards: list[float]) -> Iterator[Finding]:
        """Differences between `here` finished trajectories, with their sums and rewards, and the
        counts.
        """
        if self.done is None:
            return
        if here != self.done:
            if here < self.done or not self.fewer:
                yield Finding(
                    differs("the number of finished trajectories", here, self.done)
                    + ", as the run counted"
                )
            return
        for name in SUMMED:
            if name in self.values and self.values[name] != tally[name]:
                yield Finding(
                    differs(f"counts.{name}, against the records", self.values[name], tally[name])
                )
        reasons = {
            name.partition(".")[2]: count
            for name, count in tally.items()
            if name.startswith("stop_reasons.")
        }
        if isinstance(counted := self.values.get("stop_reasons"), dict) and counted != reasons:
            yield Finding(differs("counts.stop_reasons, against the records", counted, reasons))
        yield from self._reward_findings(rewards)

    def _reward_findings(self, rewards: list[float]) -> Iterator[Finding]:
        mean, ours = (
            self.values.get("mean_reward"),
            math.fsum(rewards) / len(rewards) if rewards else None,
        )
        if isinstance(mean, (int, float)) and (
            ours is None or not math.isclose(mean, ours, rel_tol=1e-6, abs_tol=1e-6)
        ):
            yield Finding(differs("counts.mean_reward, against the records", mean, ours))

    def note(self, here: int, unfinished: int) -> str:
        """Why missing samples are no defect."""
        there = f"{here} finished trajectories are here" + (
            f", {unfinished} unfinished" if unfinished else ""
        )
        if self.done is None:
            why = f"the run is in progress or was killed: {there}"
        elif self.over_samples:
            why = f"the run cut off the slowest conversations (over_sample_rate): {there}"
        elif self.asked == self.done:
            why = f"a larger run was resumed for {self.done} conversations (--limit): {there}"
        else:
            why = f"the run stopped at {self.done} of {self.asked} conversations: {there}"
        return f"{why}; missing samples were not looked for"


def _asked_otherwise(manifest: dict[str, Any]) -> bool:
    """Whether the run was resumed by force with other tasks, or another number of samples."""
    starts = manifest.get("earlier_starts")
    return isinstance(starts, list) and any(
        isinstance(start, dict) and start.get(name) != manifest.get(name)
        for start in starts
        for name in ("tasks", "n")
    )
