"""A report's row counts what happened, and its table and JSON say beside each figure what was asked
for.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from agent.recipe.metrics import Ratio
from agent.recipe.report import (
    ADAPTER,
    BASE,
    GENERATED,
    GSM8K,
    RECOVERY,
    Condition,
    Row,
    cell,
    report_table,
    row,
    targets,
    write_report,
)
from conversations.trajectory import Turn
from tests.agent.recipe.test_metrics import ANSWER, CODE, record

GREEDY = Condition(ADAPTER, GENERATED, 0.0)


def found() -> Row:
    """Two conversations of three asked for: one right on a question of the training data, one wrong
    on a new one.
    """
    right = dataclasses.replace(
        record([CODE, ANSWER], turns=[Turn(10, 30, "stop", 10)]), task_id="old"
    )
    wrong = dataclasses.replace(record([CODE], reward=0.0, stop_reason="length"), task_id="new")
    return row(GREEDY, 3, [right, wrong], {"old"}, 1.25)


def test_a_row_counts_what_is_done_and_what_is_new() -> None:
    one = found()
    assert (one.asked, one.scores.complete, one.scores.right, one.new) == (
        3,
        Ratio(1, 2),
        Ratio(1, 2),
        Ratio(0, 1),
    )
    assert (one.stop_reasons, one.sampled_tokens, one.infra_errors) == (
        {"stop": 1, "length": 1},
        20,
        0,
    )


@pytest.mark.parametrize(
    ("share", "wanted", "text"),
    [
        (Ratio(62, 64), 0.9, "96.9% 62/64 (>= 90%)"),
        (Ratio(9, 10), 0.9, "90.0% 9/10 (>= 90%)"),
        (Ratio(1, 2), 0.6, "50.0% 1/2 (MISSED 60%)"),
        (Ratio(1, 2), None, "50.0% 1/2"),
        (Ratio(0, 0), None, ""),
        (Ratio(0, 0), 0.95, "none (>= 95%)"),
    ],
)
def test_a_figure_says_whether_it_is_enough(share: Ratio, wanted: float | None, text: str) -> None:
    assert cell(share, wanted) == text


def test_every_condition_of_the_adapter_is_asked_for_something_and_the_base_model_for_nothing() -> (
    None
):
    assert targets(GREEDY) == {"valid_calls": 0.95, "complete": 0.90, "right": 0.60}
    assert targets(Condition(ADAPTER, GENERATED, 1.0, reverse=True)) == {
        "valid_calls": 0.95,
        "complete": 0.80,
    }
    assert targets(Condition(ADAPTER, GSM8K, 0.0, reverse=True)) == {
        "valid_calls": 0.95,
        "complete": 0.90,
    }
    assert targets(Condition(ADAPTER, RECOVERY, 0.0)) == {"recovered": 0.60}
    assert targets(Condition(BASE, GENERATED, 0.0)) == {}


def test_the_table_is_markdown() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table([found(), found()]))
    lines = [line.strip() for line in str(console.file.getvalue()).splitlines() if line.strip()]  # type: ignore[attr-defined]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {10}
    assert set(lines[1]) <= set("|-")
    assert [text.strip() for text in lines[2].split("|")][1:5] == [
        "adapter",
        "generated",
        "greedy",
        "shipped order",
    ]


def test_the_json_holds_counts_and_targets(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.json", {"adapter": "x"}, [found()])
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["adapter"] == "x"
    assert report["rows"][0]["condition"] == {
        "model": "adapter",
        "problems": "generated",
        "temperature": 0.0,
        "reverse": False,
    }
    assert report["rows"][0]["scores"]["right"] == {"part": 1, "whole": 2}
    assert report["rows"][0]["targets"]["complete"] == 0.90
