"""One row for each task, for formats that hold prompts to run again."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from conversations.export.formats import Record, Source


def first_of_each_task(source: Source) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Yields each task's first selected record, with `samples` and `reward_mean` of those selected.

    Tasks come in file order.
    """
    first: dict[str, str] = {}
    rewards: dict[str, list[float]] = {}
    samples: dict[str, int] = {}
    for record in source:
        task_id = record["task_id"]
        first.setdefault(task_id, record["id"])
        samples[task_id] = samples.get(task_id, 0) + 1
        if record["reward"] is not None:
            rewards.setdefault(task_id, []).append(record["reward"])
    for task_id, trajectory_id in first.items():
        mean = fmean(rewards[task_id]) if task_id in rewards else None
        yield (
            source.run.record(trajectory_id, check=False),
            {"samples": samples[task_id], "reward_mean": mean},
        )
