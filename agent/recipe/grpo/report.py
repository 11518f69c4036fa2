"""The table and the curve of a run: turntrace's step folders beside verl's own metrics."""

from __future__ import annotations

import contextlib
import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.recipe.grpo.reward import ENDED, score_of
from agent.recipe.grpo.rows import HELD_OUT_SOURCE, TRAIN_SOURCE
from agent.recipe.grpo.settings import Layout, Reward
from conversations.errors import ConversationsError, RunFolderError
from conversations.run.open_run import open_run
from conversations.run.store import RUN, TRAJECTORIES
from conversations.steps import StepFigures, Sum, step_folders, well_formed_records
from conversations.trajectory import Trajectory
from conversations.verify import verify_run

Z = 1.96
"""Of a 95% interval."""


@dataclass(slots=True)
class Scored:
    """The records of one step and source: their figures, and their scores by the recipe's rule."""

    figures: StepFigures
    score: Sum = field(default_factory=Sum)

    @property
    def ended(self) -> int:
        """How many conversations the model ended itself."""
        return self.figures.stop_reasons[ENDED]


@dataclass(slots=True)
class Report:
    """What a run's folder says. `train` and `held_out` are by the step of the weights.

    `metrics` is verl's own dictionary by training step: the step k samples with weights k - 1.
    `unread` says what could not be counted.
    """

    train: dict[int, Scored] = field(default_factory=dict)
    held_out: dict[int, Scored] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    dumps: dict[int, Counter[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """The training steps that are done.

        After a kill between a step's checkpoint and its metrics its records alone are left.
        """
        timed = {number for number, found in self.metrics.items() if "timing_s/step" in found}
        last = max(self.metrics, default=0)
        return sorted(timed | {step + 1 for step in self.train if step < last})

    def reward(self, number: int) -> float | None:
        """The mean reward of a training step: verl's, without that the records'."""
        found: float | None = self.metrics.get(number, {}).get("critic/score/mean")
        step = self.train.get(number - 1)
        return found if found is not None or step is None else step.score.mean


def read_report(layout: Layout) -> Report:
    """Reads a run that has ended, or that is in progress. Raises ConfigError if it is none."""
    from_tools = layout.kept_settings()["reward"] == Reward.tools
    report = Report(metrics=read_metrics(layout))
    if not layout.steps.is_dir():  # verl's own loop leaves no run folders
        report.dumps = _dumps(layout)
        return report
    try:
        folders = step_folders(layout.steps)
    except RunFolderError as error:
        report.unread.append(str(error))
        return report
    for number, of_step in folders.items():
        for folder in of_step:
            try:
                _count(report, number, folder, from_tools)
            except ConversationsError as error:
                report.unread.append(str(error))
    return report


def _count(report: Report, number: int, folder: Path, from_tools: bool) -> None:
    by_source = {TRAIN_SOURCE: report.train, HELD_OUT_SOURCE: report.held_out}
    for record in well_formed_records(open_run(folder)):
        if (of := by_source.get(record["data_source"])) is None:
            continue
        counted = of.setdefault(number, Scored(StepFigures(number)))
        counted.figures.add(record)
        score = score_of(Trajectory.from_record(record), from_tools=from_tools)
        if score is not None:
            counted.score.add(score)


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, Z * Z
    middle = share + square / (2 * count)
    width = Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def steps_table(report: Report) -> str:
    """The steps as a Markdown table, then the held-out shares and where the time went."""
    lines = ["| step | " + " | ".join(_COLUMNS) + " |", "|" + "---|" * (len(_COLUMNS) + 1)]
    for number in report.numbers():
        cells = _cells(report, number, report.metrics.get(number, {}))
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    missing = [f"not counted: {reason}" for reason in report.unread]
    return "\n".join([*lines, "", *_held_out(report), "", *_time(report), *missing]) + "\n"


_COLUMNS = (
    "reward", "valid calls", "calls", "turns", "response tokens", "ended by the model", "entropy",
    "infra failures", "probability difference, mean", "s a step", "s generation", "s update",
)  # fmt: skip


def _cells(report: Report, number: int, metrics: Mapping[str, Any]) -> Iterator[str]:
    counted = report.train.get(number - 1)
    yield _number(report.reward(number))
    if counted is None:
        yield from ["-"] * 3
        yield _number(metrics.get("response_length/mean"), 0)
        yield "-"
        yield _number(metrics.get("actor/entropy"))
        told = report.dumps.get(number)
        yield f"{told['failed']} of {told['rows']}, told the model" if told else "-"
    else:
        step = counted.figures
        valid = None if step.malformed is None else 1 - step.malformed
        yield f"{_number(valid)} of {step.calls.total()}"
        yield _number(step.calls_each, 2)
        yield _number(step.turns.mean, 2)
        yield _number(step.response_tokens.mean, 0)
        yield f"{counted.ended} of {step.trajectories}"
        yield _number(metrics.get("actor/entropy"))
        yield f"{step.infra_errors} of {step.trajectories}"
    yield _number(metrics.get("training/rollout_probs_diff_mean"), 5)
    for name in ("timing_s/step", "timing_s/gen", "timing_s/update_actor"):
        yield _number(metrics.get(name), 1)


def _held_out(report: Report) -> Iterator[str]:
    head = (
        "weights of step",
        "held-out, right at temperature 0 [95%]",
        "asked",
        "ended by the model",
    )
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for number, step in sorted(report.held_out.items()):
        right, asked = step.score.total, step.score.count
        low, high = interval(round(right), asked)
        share = right / max(1, asked)
        yield f"| {number} | {share:.3f} [{low:.3f}, {high:.3f}] | {asked} | {step.ended} |"
    for number, metrics in sorted(report.metrics.items()):
        for name, value in metrics.items():
            if name.startswith("val-core/"):
                yield f"| {number} (verl's {name}) | {_number(value)} | | |"


def _time(report: Report) -> Iterator[str]:
    of = {
        name: sum(metrics.get(f"timing_s/{name}", 0.0) for metrics in report.metrics.values())
        for name in ("step", "gen", "old_log_prob", "update_actor", "update_weights")
    }
    whole = of["step"] or 1.0
    yield f"time: {whole:.0f} s of steps; " + ", ".join(
        f"{name} {of[name] / whole:.0%}" for name in of if name != "step"
    )
    wall = sum(step.figures.wall_s for step in report.train.values())
    tools = sum(step.figures.tools_s for step in report.train.values())
    if wall:
        yield f"of the conversations' own time, {tools / wall:.1%} is tool calls, waiting included"


def verified(layout: Layout) -> list[str]:
    """The defects of every step's folder, one line each; [] if all pass `verify`.

    A folder without a run.json and records is being made, or its trainer was killed then.
    """
    found: list[str] = []
    for folder in sorted(layout.steps.glob("step-*")):
        if (folder / RUN).exists() or (folder / TRAJECTORIES).exists():
            verify_run(folder, on_defect=lambda defect: found.append(str(defect)))
    return found


def read_metrics(layout: Layout) -> dict[int, dict[str, Any]]:
    """verl's metrics by step; of a step that was done again, the last.

    A start goes on from its first entry, which is a validation: later steps of earlier starts are
    superseded.
    """
    found: dict[int, dict[str, Any]] = {}
    for file in layout.metrics():
        for number, entry in enumerate(_lines(file)):
            if number == 0:
                found = {step: data for step, data in found.items() if step <= entry["step"]}
            found.setdefault(entry["step"], {}).update(entry["data"])
    return found


def _lines(file: Path) -> Iterator[Any]:
    """The values of a JSONL file but those of a torn line, which a killed trainer leaves."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _dumps(layout: Layout) -> dict[int, Counter[str]]:
    """Of verl's own dumps: rewards and errors by training step."""
    found = {}
    for file in sorted(layout.dumps.glob("*.jsonl")):
        counts: Counter[str] = Counter()
        for row in _lines(file):
            failed = "Error executing tool 'code_interpreter': the sandbox is not" in row["output"]
            counts.update({"rows": 1, "right": int(row["score"] > 0), "failed": int(failed)})
            counts["failed and right"] += int(failed and row["score"] > 0)
        found[int(file.stem)] = counts
    return found


def _number(value: Any, digits: int = 3) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"


def curve(reports: Mapping[str, Report]) -> str:
    """The mean reward by step of several runs as one SVG."""
    lines = {
        name: [
            (number, reward)
            for number in report.numbers()
            if (reward := report.reward(number)) is not None
        ]
        for name, report in reports.items()
    }
    return _svg(lines)


_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")


def _svg(lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    points = [point for line in lines.values() for point in line]
    right = max((x for x, _ in points), default=1)
    top = max((y for _, y in points), default=1.0) * 1.1 or 1.0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 320" font-family="sans-serif" '
        'font-size="12">',
        '<path d="M40 280H620M40 280V20" stroke="#888" fill="none"/>',
        f'<text x="4" y="24">{top:.2f}</text><text x="20" y="284">0</text>',
        f'<text x="600" y="300">{right}</text><text x="300" y="310">step</text>',
    ]
    for place, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        path = " ".join(
            f"{40 + 580 * x / max(1, right):.1f},{280 - 260 * y / top:.1f}" for x, y in line
        )
        parts.append(f'<polyline points="{path}" stroke="{colour}" fill="none"/>')
        parts.append(
            f'<text x="60" y="{36 + 16 * place}" fill="{colour}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
