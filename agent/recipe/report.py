"""What an examination found: one row a condition, its counts beside what was asked for, as a table
and as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from agent.recipe.metrics import OutcomeShares, Ratio, scores
from conversations.trajectory import Trajectory

ADAPTER, BASE = "adapter", "base"
GENERATED, GSM8K, RECOVERY = "generated", "GSM8K", "recovery"


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to examine a model. `reverse`: the tools in the other order than the shipped one."""

    model: str
    problems: str
    temperature: float
    reverse: bool = False

    def __str__(self) -> str:
        sampling = "greedy" if self.temperature == 0 else f"T={self.temperature:g}"
        return f"{self.model}, {self.problems}, {sampling}, {self.order} order"

    @property
    def order(self) -> str:
        """Of the tools in the prompt."""
        return "other" if self.reverse else "shipped"


@dataclass(frozen=True, slots=True)
class Row:
    """What one condition gave.

    `new` are the right answers among problems that training did not see word for word.
    """

    condition: Condition
    asked: int
    scores: OutcomeShares
    new: Ratio
    stop_reasons: dict[str, int]
    infra_errors: int
    sampled_tokens: int
    wall_s: float


def row(
    condition: Condition,
    asked: int,
    trajectories: Sequence[Trajectory],
    seen: set[str],
    wall_s: float,
) -> Row:
    """Sums up one condition's conversations.

    `seen` are the ids of the tasks that training saw word for word.
    """
    return Row(
        condition=condition,
        asked=asked,
        scores=scores(trajectories),
        new=scores(
            [trajectory for trajectory in trajectories if trajectory.task_id not in seen]
        ).right,
        stop_reasons=dict(Counter(trajectory.stop_reason for trajectory in trajectories)),
        infra_errors=sum(trajectory.infra_error for trajectory in trajectories),
        sampled_tokens=sum(
            turn.end - turn.start for trajectory in trajectories for turn in trajectory.turns
        ),
        wall_s=round(wall_s, 1),
    )


def targets(condition: Condition) -> dict[str, float]:
    """What the shipped adapter has to reach, by the names of `Scores`; the base model is only there
    to compare.
    """
    if condition.model != ADAPTER:
        return {}
    if condition.problems == RECOVERY:
        return {"recovered": 0.60}
    wanted = {"valid_calls": 0.95, "complete": 0.90 if condition.temperature == 0 else 0.80}
    return wanted | (
        {"right": 0.60} if condition.problems == GENERATED and condition.temperature == 0 else {}
    )


_COLUMNS = {
    "valid_calls": "valid calls",
    "complete": "whole protocol",
    "right": "right answer",
    "recovered": "recovered",
}


def report_table(rows: Sequence[Row]) -> Table:
    """The rows as a table that is Markdown, too: each figure with its counts and, where there is
    one, its target.
    """
    found = Table(box=box.MARKDOWN)
    for name in ("model", "problems", "sampling", "tools in", *_COLUMNS.values(), "right, new"):
        found.add_column(name, no_wrap=True)
    for one in rows:
        condition, wanted = one.condition, targets(one.condition)
        names = (
            condition.model,
            condition.problems,
            "greedy" if condition.temperature == 0 else f"T={condition.temperature:g}",
        )
        figures = [cell(getattr(one.scores, name), wanted.get(name)) for name in _COLUMNS]
        found.add_row(
            *names,
            f"{condition.order} order",
            *figures,
            cell(one.new) if condition.problems != RECOVERY else "",
        )
    return found


def cell(share: Ratio, wanted: float | None = None) -> str:
    """`96.9% 62/64 (>= 90%)`; a figure that misses its target says so."""
    if share.value is None:
        return "" if wanted is None else f"none (>= {wanted:.0%})"
    text = f"{share.value:.1%} {share.part}/{share.whole}"
    if wanted is None:
        return text
    return f"{text} (>= {wanted:.0%})" if share.value >= wanted else f"{text} (MISSED {wanted:.0%})"


def write_report(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The report as JSON: what was examined, then the rows with their targets."""
    listed = [{**asdict(one), "targets": targets(one.condition)} for one in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": listed}, indent=2) + "\n", encoding="utf-8")
