"""Group-relative advantages of a run, kept in `advantages.jsonl` beside its records.

The first line is about the whole: the estimator, the group size, what was left out. Each further
line is one trajectory's:

    {"id": ..., "sha256": its record's, "advantage": a number, or null}

A group is the samples of one task, and it is whole if each of them has a reward: a group that
infrastructure made smaller has no advantages, because its mean is another one. No record is
changed: a line whose `sha256` is not its record's is out of date.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from conversations.checks.shape import well_formed
from conversations.errors import RunFolderError
from conversations.run.beside import line_beside, read_beside, write_beside
from conversations.run.open_run import Run

ADVANTAGES = "advantages.jsonl"
EPSILON = 1e-6
"""Added to the standard deviation, as verl does."""


def grpo(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6), std of the sample (Shao et al. 2024, arXiv:2402.03300).

    As verl's `compute_grpo_outcome_advantage`.
    """
    spread = stdev(rewards)
    return [value / (spread + EPSILON) for value in mean_baseline(rewards)]


def mean_baseline(rewards: Sequence[float]) -> list[float]:
    """r - mean: GRPO without the division (Liu et al. 2025, "Dr. GRPO", arXiv:2503.20783)."""
    middle = mean(rewards)  # exact: equal rewards have exactly 0
    return [reward - middle for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """r minus the mean of the others: RLOO (Ahmadian et al. 2024, arXiv:2402.14740)."""
    count = len(rewards)
    return [value * count / (count - 1) for value in mean_baseline(rewards)]


ESTIMATORS: Mapping[str, Callable[[Sequence[float]], list[float]]] = {
    "grpo": grpo,
    "rloo": leave_one_out,
    "leave-one-out": leave_one_out,
    "mean": mean_baseline,
}
"""By name; each takes the rewards of a whole group of two or more."""


@dataclass(slots=True)
class GroupCounts:
    """How many groups there are, how many are not whole, and how many have no spread."""

    groups: int = 0
    incomplete: int = 0
    without_spread: int = 0
    trajectories: int = 0


def compute(run: Run, estimator: str, group_size: int | None = None) -> tuple[GroupCounts, Path]:
    """Writes the advantages of a run beside it; returns the counts and the file.

    `group_size` is how many samples a whole group has; by default what the run asked for. Raises
    RunFolderError for an estimator that does not exist, or a run without groups.
    """
    if estimator not in ESTIMATORS:
        raise RunFolderError(
            f"there is no estimator {estimator!r}; there are {', '.join(ESTIMATORS)}"
        )
    rewards, hashes = _rewards(run)
    size = group_size or _group_size(run, rewards)
    if size < 2:
        raise RunFolderError(
            f"{run.path} has groups of one sample: an advantage needs two or more; "
            "run with rollout.n, or give --group-size"
        )
    counts, values = GroupCounts(), dict[str, float]()
    for group in rewards.values():
        _add_group(group, size, ESTIMATORS[estimator], counts, values)
    counts.trajectories = len(values)
    head = {
        "estimator": estimator,
        "group_size": size,
        "groups": counts.groups,
        "incomplete": counts.incomplete,
        "without_spread": counts.without_spread,
    }
    lines = (_line(name, sha256, values.get(name)) for name, sha256 in hashes.items())
    return counts, write_beside(run.path / ADVANTAGES, head, lines)


def _rewards(run: Run) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """{task: {id: its reward}} and {id: the record's hash}."""
    rewards: dict[str, dict[str, float | None]] = {}
    hashes: dict[str, str] = {}
    for record in map(well_formed, run.records()):
        reward = None if record["infra_error"] else record["reward"]
        rewards.setdefault(record["task_id"], {})[record["id"]] = reward
        hashes[record["id"]] = record["sha256"]
    return rewards, hashes


def _group_size(run: Run, rewards: Mapping[str, Mapping[str, Any]]) -> int:
    """What the run asked for; without that the size that most groups have."""
    asked = run.manifest.get("n")
    trainer = run.manifest.get("trainer")
    if asked is None and isinstance(trainer, dict):
        asked = (trainer.get("rollout") or {}).get("n")
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked
    sizes = Counter(len(group) for group in rewards.values())
    return max(sizes, key=lambda size: (sizes[size], size), default=0)


def _add_group(
    group: Mapping[str, float | None],
    size: int,
    estimate: Callable[[Sequence[float]], list[float]],
    counts: GroupCounts,
    values: dict[str, float],
) -> None:
    counts.groups += 1
    rewards = [reward for reward in group.values() if reward is not None]
    if len(rewards) < max(size, len(group)):
        counts.incomplete += 1
        return
    counts.without_spread += len(set(rewards)) == 1
    values.update(zip(group, estimate(rewards), strict=True))


def _line(name: str, sha256: str, value: float | None) -> bytes:
    return line_beside({"id": name, "sha256": sha256, "advantage": value})


class SavedAdvantages:
    """The advantages in a run folder; empty if there is no file.

    The file may come from anybody: a line that is no such line counts as absent. `head` is its
    first line.
    """

    def __init__(self, folder: Path) -> None:
        self.head: dict[str, Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        file = folder / ADVANTAGES
        if not file.is_file():
            return
        with file.open("rb") as lines:
            self.head = read_beside(next(lines, b""))
            for line in lines:
                found = read_beside(line)
                value = _finite(found.get("advantage"))
                if value is not None:
                    self._values[str(found.get("id")), str(found.get("sha256"))] = value

    def of(self, record: Mapping[str, Any]) -> float | None:
        """A record's advantage; None if it has none, or one of another state of it."""
        return self._values.get((str(record["id"]), str(record["sha256"])))


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
