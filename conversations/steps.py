"""A training's run folders, step by step: what changed while the model learned.

A folder of steps holds run folders whose run.json names a `step`: those of a trainer (several
workers write one each for a step), and those of training rounds, one level further down, which name
the `part` that they are of a round. Invariant: a record counts in exactly one step, and memory
holds no more than one record at a time and a few numbers a task.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.checks.shape import well_formed
from conversations.errors import RecordError, RunFolderError
from conversations.run.open_run import Run, open_run
from conversations.run.store import RUN, read_manifest
from conversations.trajectory import INVALID_STATUSES

Record = Mapping[str, Any]
_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(slots=True)
class Sum:
    """A mean in the making."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float | None:
        """None if nothing was added."""
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class StepFigures:
    """What the records of one step say. Means are over the records without an infra error.

    `surprisal` is the mean of minus the log-prob over sampled tokens, in nats: an estimate of the
    policy's entropy at the sampling temperature. `tasks` is the mean reward by task. `wall_s` and
    `tools_s` are sums over conversations: their own time, and what calls waited and ran of it.
    """

    number: int
    trajectories: int = 0
    infra_errors: int = 0
    reward: Sum = field(default_factory=Sum)
    response_tokens: Sum = field(default_factory=Sum)
    sampled_tokens: Sum = field(default_factory=Sum)
    turns: Sum = field(default_factory=Sum)
    calls: Counter[str] = field(default_factory=Counter)
    surprisal: Sum = field(default_factory=Sum)
    wall_s: float = 0.0
    tools_s: float = 0.0
    stop_reasons: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, Sum] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Counts one record, which `well_formed` has let pass."""
        self.trajectories += 1
        self.stop_reasons[record["stop_reason"]] += 1
        self.calls.update(call["status"] for call in record["tool_calls"])
        self.wall_s += record["wall_s"]
        self.tools_s += sum(call["queue_s"] + call["run_s"] for call in record["tool_calls"])
        if record["infra_error"]:
            self.infra_errors += 1
            return
        self.response_tokens.add(len(record["response_ids"]))
        self.sampled_tokens.add(sum(record["response_mask"]))
        self.turns.add(record["num_turns"])
        for value in record["response_logprobs"]:
            if value is not None and math.isfinite(value):
                self.surprisal.add(-value)
        if record["reward"] is not None:
            self.reward.add(record["reward"])
            self.tasks.setdefault(record["task_id"], Sum()).add(record["reward"])

    @property
    def calls_each(self) -> float | None:
        """Tool calls a trajectory."""
        return self.calls.total() / self.trajectories if self.trajectories else None

    @property
    def malformed(self) -> float | None:
        """Share of the calls that were the model's mistake: malformed, unknown or invalid."""
        invalid = sum(self.calls[status] for status in INVALID_STATUSES)
        return invalid / self.calls.total() if self.calls else None

    @property
    def infra_share(self) -> float | None:
        """Share of the trajectories that infrastructure failed."""
        return self.infra_errors / self.trajectories if self.trajectories else None


FIGURES: Mapping[str, Callable[[StepFigures], float | None]] = {
    "reward": lambda step: step.reward.mean,
    "response tokens": lambda step: step.response_tokens.mean,
    "turns": lambda step: step.turns.mean,
    "calls": lambda step: step.calls_each,
    "invalid calls": lambda step: step.malformed,
    "infra failures": lambda step: step.infra_share,
    "entropy, nats": lambda step: step.surprisal.mean,
}
"""The figures of a step by name, in the order to show them."""


def run_folders(root: Path) -> dict[str, Path]:
    """The run folders in `root` by name, in order.

    Those one level further down that name a `part` are among them: `round-1:sampled`.

    Raises OSError if `root` cannot be read.
    """
    found: dict[str, Path] = {}
    for folder in sorted(root.iterdir()):
        if (folder / RUN).is_file():
            found[folder.name] = folder
        else:
            found.update((f"{folder.name}:{part.name}", part) for part in _parts_in(folder))
    return found


def _parts_in(folder: Path) -> Iterator[Path]:
    """The run folders in a folder that name a `part`; what cannot be read names none."""
    with contextlib.suppress(OSError):
        for inner in sorted(folder.iterdir()):
            with contextlib.suppress(RunFolderError):
                if (inner / RUN).is_file() and part_name(read_manifest(inner)):
                    yield inner


def step_folders(root: str | Path) -> dict[int, list[Path]]:
    """The run folders in `root` by step, in order. Raises RunFolderError if there are none."""
    root, found = Path(root), dict[int, list[Path]]()
    for folder in run_folders(root).values() if root.is_dir() else ():
        if (number := _step(folder)) is not None:
            found.setdefault(number, []).append(folder)
    if not found:
        raise RunFolderError(
            f"{root} holds no steps: no run folder in it whose run.json names a step"
        )
    return dict(sorted(found.items()))


def is_steps(root: str | Path) -> bool:
    """Whether `root` is a folder of steps and no run folder itself."""
    root = Path(root)
    if (root / RUN).is_file():
        return False
    try:
        return bool(step_folders(root))
    except RunFolderError:
        return False


def records(root: str | Path) -> Iterator[tuple[int, Run, dict[str, Any]]]:
    """(step, its run, record) of all steps, in order.

    Raises RunFolderError at a record that has not a record's form.
    """
    for number, folders in step_folders(root).items():
        for folder in folders:
            run = open_run(folder)
            for record in well_formed_records(run):
                yield number, run, record


def well_formed_records(run: Run) -> Iterator[dict[str, Any]]:
    """A run's records. Raises RunFolderError at one that has not a record's form."""
    for record in run.records(check=False):
        try:
            checked = well_formed(record)
        except RecordError as error:
            raise RunFolderError(f"{run.path}: {error}") from error
        yield checked


def steps(root: str | Path) -> dict[str, list[StepFigures]]:
    """The figures of each step by part of the data, the part that most steps have first.

    Training and validation records may share a step, and their means have nothing in common.
    """
    found: dict[str, dict[int, StepFigures]] = {}
    for number, run, record in records(root):
        of_part = found.setdefault(_part(run, record), {})
        of_part.setdefault(number, StepFigures(number)).add(record)
    parts = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: list(figures.values()) for name, figures in parts}


def _part(run: Run, record: Record) -> str:
    """What its run says to be a part of; else its data source, and whether its run validates."""
    if part := part_name(run.manifest):
        return part
    source = record["data_source"]
    name = "no data source" if source is None else str(source)
    return f"{name}, validation" if run.manifest.get("validate") is True else name


def part_name(manifest: Mapping[str, Any]) -> str | None:
    """The part of a round that a run says to be; None if it is of none."""
    part = manifest.get("part")
    return part if isinstance(part, str) and part else None


def _step(folder: Path) -> int | None:
    step = read_manifest(folder).get("step")
    return int(step) if isinstance(step, (int, str)) and _DIGITS.fullmatch(str(step)) else None
