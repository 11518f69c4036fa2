"""A training's steps as one HTML page: for each part of the data every figure by step and the
table; then the tasks by step.

Everything stands in the page as escaped text and plain SVG; it has no script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conversations.errors import RunFolderError
from conversations.page.html import steps_shell
from conversations.run.open_run import Run
from conversations.run.whole_file import write_whole
from conversations.steps import FIGURES, StepFigures, Sum, part_name, records, steps

TASKS = 200
"""The most tasks in the page's grid."""
_WIDTH, _HEIGHT, _EDGE = 280, 90, 6


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure by step: the polyline's points, the least and the greatest value as text."""

    name: str
    points: str
    dots: list[tuple[float, float, str]]
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class PartOfSteps:
    """One part of the data: its name, its figures' plots, and a row for each step."""

    name: str
    plots: list[Plot]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Links:
    """Where a served page of steps leads: to the list of runs, and to a task's trajectories."""

    runs: str
    task: Callable[[str], str]


def steps_page(root: Path, links: Links | None = None) -> tuple[str, int]:
    """The page of a folder of steps, and the number of steps; with `links` as a server shows it.

    Raises RunFolderError if there are no steps.
    """
    found = steps(root)
    numbers = sorted({step.number for of_part in found.values() for step in of_part})
    asked = _asked_in_several(found)
    text = steps_shell(
        served=links is not None,
        links=links,
        title=root.resolve().name,
        sections=[_part(name, of_part) for name, of_part in found.items()],
        names=list(FIGURES),
        numbers=numbers,
        tasks=[
            (task, [_mean(means.get(number)) for number in numbers])
            for task, means in islice(asked.items(), TASKS)
        ],
        left_out=max(0, len(asked) - TASKS),
    )
    return text, len(numbers)


def _part(name: str, of_part: Sequence[StepFigures]) -> PartOfSteps:
    plots = [plot for figure in FIGURES if (plot := _plot(figure, of_part))]
    return PartOfSteps(name, plots, [_row(step) for step in of_part])


def write_steps(root: Path, target: Path) -> tuple[int, int]:
    """Writes the page of a folder of steps; returns the number of steps and the bytes.

    Raises RunFolderError if there are no steps, or if the page cannot be written.
    """
    text, count = steps_page(root)
    try:
        return count, write_whole(target, iter([text.encode()]))
    except OSError as error:
        raise RunFolderError(f"{target} cannot be written: {error.strerror}") from error


def _plot(name: str, found: Sequence[StepFigures]) -> Plot | None:
    values = [(step.number, FIGURES[name](step)) for step in found]
    known = [(number, value) for number, value in values if value is not None]
    if not known:
        return None
    low, high = (choose(value for _, value in known) for choose in (min, max))
    first, last = known[0][0], known[-1][0]
    across = _scale(first, last, _EDGE, _WIDTH - _EDGE)
    up = _scale(low, high, _HEIGHT - _EDGE, _EDGE)
    dots = [
        (round(across(number), 1), round(up(value), 1), f"step {number}: {value:.4g}")
        for number, value in known
    ]
    points = " ".join(f"{x},{y}" for x, y, _ in dots)
    return Plot(name, points, dots, f"{low:.4g}", f"{high:.4g}")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _row(step: StepFigures) -> list[str]:
    figures = (FIGURES[name](step) for name in FIGURES)
    return [
        str(step.number),
        str(step.trajectories),
        *("–" if value is None else f"{value:.4g}" for value in figures),
    ]


def _asked_in_several(found: Mapping[str, Sequence[StepFigures]]) -> dict[str, dict[int, Sum]]:
    """The rewards by step of the tasks that more than one step asked."""
    seen: dict[str, dict[int, Sum]] = {}
    for of_part in found.values():
        for step in of_part:
            for task, rewards in step.tasks.items():
                total = seen.setdefault(task, {}).setdefault(step.number, Sum())
                total.total += rewards.total
                total.count += rewards.count
    return {task: means for task, means in seen.items() if len(means) > 1}


def _mean(rewards: Sum | None) -> str:
    return "" if rewards is None or rewards.mean is None else f"{rewards.mean:.3g}"


class TaskOverSteps:
    """One task's trajectories in all steps, for the page of a run: `step-K/ID`, in order.

    Of training rounds, whose steps have parts, `step-K/PART/ID`.

    Raises RunFolderError if no step asked the task.
    """

    def __init__(self, root: Path, task_id: str) -> None:
        self._records = [
            (number, run, record)
            for number, run, record in records(root)
            if record["task_id"] == task_id
        ]
        if not self._records:
            raise RunFolderError(f"no step in {root} has the task {task_id!r}")
        first: Run = self._records[0][1]
        self.path = first.path
        self.manifest = first.manifest

    def __len__(self) -> int:
        return len(self._records)

    def records(self, *, check: bool = True) -> Iterator[dict[str, Any]]:
        """The records, each with its step in its id."""
        for number, run, record in self._records:
            parts = (f"step-{number}", part_name(run.manifest), record["id"])
            yield {**record, "id": "/".join(part for part in parts if part)}
