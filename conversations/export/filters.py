"""Which trajectories of a run are exported, and why the others are not.

Filters apply in the order of `REASONS`, and a trajectory counts for the first one that drops it, so
the kept ones and the counts add up to the run. Filters on groups use the groups of the whole run.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conversations.checks.shape import well_formed
from conversations.errors import ExportError
from conversations.export.groups import PASS_REWARD, Statistics
from conversations.run.open_run import Run
from conversations.trajectory import INVALID_STATUSES, STOP_REASONS, canonical_json

REASONS = {
    "infrastructure failed": "include_infra_errors",
    "group's rewards are all equal": "mixed_groups",
    "group's pass rate": "pass_rate",
    "no reward": "min_reward or max_reward",
    "reward": "min_reward or max_reward",
    "stop reason": "stop_reasons",
    "invalid tool call": "valid_calls_only",
    "too many tokens": "max_tokens",
    "duplicate": "dedupe",
}
"""Why a trajectory is left out, in order, with the field of `Filters` that decides it."""


@dataclass(frozen=True, slots=True)
class Filters:
    """What to keep. The defaults keep everything but infrastructure failures.

    Bounds are inclusive. `pass_rate` is the share of a group's samples with a reward of at least
    `pass_reward`. `max_tokens` counts prompt and response. `dedupe` keeps the first of several with
    the same token ids. Raises ExportError for values that make no sense.
    """

    min_reward: float | None = None
    max_reward: float | None = None
    stop_reasons: frozenset[str] = frozenset()
    valid_calls_only: bool = False
    mixed_groups: bool = False
    pass_rate: tuple[float, float] | None = None
    pass_reward: float = PASS_REWARD
    max_tokens: int | None = None
    dedupe: bool = False
    include_infra_errors: bool = False

    def __post_init__(self) -> None:
        if unknown := self.stop_reasons.difference(STOP_REASONS):
            raise ExportError(
                f"there is no stop reason {', '.join(sorted(unknown))}; "
                f"the stop reasons are {', '.join(STOP_REASONS)}"
            )
        if any(
            bound is not None and math.isnan(bound)
            for bound in (self.min_reward, self.max_reward, self.pass_reward)
        ):
            raise ExportError("a reward to compare with is a number, got nan")
        low, high = self.pass_rate or (0.0, 1.0)
        if not 0.0 <= low <= high <= 1.0:
            raise ExportError(
                f"a pass rate is LOW:HIGH with 0 <= LOW <= HIGH <= 1, got {low}:{high}"
            )
        if (
            self.min_reward is not None
            and self.max_reward is not None
            and self.min_reward > self.max_reward
        ):
            raise ExportError(
                f"the least reward {self.min_reward} is more than the most, {self.max_reward}"
            )

    @property
    def on_groups(self) -> bool:
        """Whether the run's groups are needed before its first trajectory."""
        return self.mixed_groups or self.pass_rate is not None


class Seen:
    """Remembers records by their token ids, or by their messages if they have no ids.

    Memory is 16 bytes a record.
    """

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def add(self, record: Mapping[str, Any]) -> bool:
        """Remembers the record. Returns whether an equal one was added before."""
        ids = [record["prompt_ids"], record["response_ids"]]
        content = canonical_json(ids if any(ids) else record["messages"])
        digest = hashlib.blake2b(content.encode("ascii"), digest_size=16).digest()
        known = digest in self._hashes
        self._hashes.add(digest)
        return known


@dataclass(slots=True)
class Selection:
    """The kept records of a run. Iterate once: it fills `whole`, `kept` and `dropped`.

    Iterating raises RecordError at a record that has not a record's form.
    """

    run: Run
    filters: Filters
    progress: Callable[[int], None] | None = None
    """Called with the number of records read."""
    whole: Statistics = field(init=False)
    kept: Statistics = field(init=False)
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        self.whole, self.kept = (Statistics(self.filters.pass_reward) for _ in range(2))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        groups = self._groups()
        for record in map(well_formed, self.run.records()):
            self.whole.add(record)
            if self.progress:
                self.progress(self.whole.trajectories)
            reason = self._reason(record, groups)
            if reason is None:
                self.kept.add(record)
                yield record
            else:
                self.dropped[reason] += 1

    def _groups(self) -> Statistics:
        """The run's rewards by group, if a filter needs them."""
        groups = Statistics(self.filters.pass_reward)
        if self.filters.on_groups:
            for record in map(well_formed, self.run.records(check=False)):
                groups.add_reward(record)
        return groups

    def _reason(self, record: Mapping[str, Any], groups: Statistics) -> str | None:
        filters = self.filters
        if record["infra_error"] and not filters.include_infra_errors:
            return "infrastructure failed"
        if filters.mixed_groups and not groups.is_mixed(record["task_id"]):
            return "group's rewards are all equal"
        if filters.pass_rate and not _in_band(groups.passed(record["task_id"]), filters.pass_rate):
            return "group's pass rate"
        return self._reward_reason(record["reward"]) or self._own_reason(record)

    def _reward_reason(self, reward: float | None) -> str | None:
        low, high = self.filters.min_reward, self.filters.max_reward
        if low is None and high is None:
            return None
        if reward is None:
            return "no reward"
        return (
            "reward"
            if (low is not None and reward < low) or (high is not None and reward > high)
            else None
        )

    def _own_reason(self, record: Mapping[str, Any]) -> str | None:
        filters = self.filters
        if filters.stop_reasons and record["stop_reason"] not in filters.stop_reasons:
            return "stop reason"
        if filters.valid_calls_only and any(
            call["status"] in INVALID_STATUSES for call in record["tool_calls"]
        ):
            return "invalid tool call"
        if (
            filters.max_tokens is not None
            and len(record["prompt_ids"]) + len(record["response_ids"]) > filters.max_tokens
        ):
            return "too many tokens"
        return "duplicate" if filters.dedupe and self._seen.add(record) else None


def _in_band(passed_of: tuple[int, int], band: tuple[float, float]) -> bool:
    passed, count = passed_of
    return count > 0 and band[0] <= passed / count <= band[1]
