"""Exports of sessions with branches: a row for each sequence, each sampled token trained once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversations.atif import document, record_of
from conversations.branches import Totals, rows
from conversations.errors import ExportError
from conversations.export.groups import Statistics
from conversations.export.job import export_run
from conversations.run.open_run import open_run
from conversations.trajectory import BRANCH_REASONS, Trajectory
from conversations.upgrade import upgraded
from tests.conversations.session.sessions import session_run
from tests.helpers import hermes_template

PA = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_run(tmp_path_factory.mktemp("session") / "run", hermes_template())


@pytest.fixture(scope="module")
def record(run: Path) -> Trajectory:
    return Trajectory.from_record(next(open_run(run).records()))


def test_token_rows_sum_to_the_sampled_tokens(
    run: Path, record: Trajectory, tmp_path: Path
) -> None:
    export_run(open_run(run), "trl-sft", tmp_path / "all")
    found = PA.read_table(tmp_path / "all" / "train.parquet").to_pylist()
    assert [row["branch"] for row in found] == list(range(1 + len(record.branches)))
    assert [row["reason"] for row in found] == [None, *(one.reason for one in record.branches)]
    assert {row["id"] for row in found} == {record.id}
    assert sum(sum(row["assistant_masks"]) for row in found) == Totals.of(record).sampled_tokens
    for row, expected in zip(found, rows(record), strict=True):
        one = expected.trajectory
        assert row["input_ids"] == one.prompt_ids + one.response_ids


def test_the_trunk_alone(run: Path, record: Trajectory, tmp_path: Path) -> None:
    export_run(open_run(run), "trl-sft", tmp_path / "trunk", branches="trunk")
    (row,) = PA.read_table(tmp_path / "trunk" / "train.parquet").to_pylist()
    assert sum(row["assistant_masks"]) == sum(record.response_mask)
    with pytest.raises(ExportError, match="branches"):
        export_run(open_run(run), "trl-sft", tmp_path / "other", branches="leaves")


@pytest.mark.parametrize("to", ["openrlhf-sft", "sharegpt", "verl-sft"])
def test_text_rows_name_their_branch(run: Path, to: str, tmp_path: Path) -> None:
    export_run(open_run(run), to, tmp_path / to)
    file = next(
        one for one in sorted((tmp_path / to).iterdir()) if one.suffix in (".jsonl", ".parquet")
        or one.name in ("turntrace.json", "train.json")
    )  # fmt: skip
    found = (
        PA.read_table(file).to_pylist()
        if file.suffix == ".parquet"
        else [json.loads(line) for line in file.read_text().splitlines()]
    )
    assert len({row["branch"] for row in found}) == len(found) > 3
    assert {row["reason"] for row in found} <= {None, *BRANCH_REASONS}


def test_whole_records_keep_their_branches(run: Path, record: Trajectory, tmp_path: Path) -> None:
    export_run(open_run(run), "parquet", tmp_path / "whole")
    (row,) = PA.read_table(tmp_path / "whole" / "trajectories.parquet").to_pylist()
    assert len(json.loads(row["branches"])) == len(record.branches)
    assert row["turns"][0]["response_id"] == record.turns[0].response_id
    line = next(open_run(run).records())
    assert upgraded(record_of(json.loads(json.dumps(document(line))))) == line


def test_statistics_count_the_branches(record: Trajectory, run: Path) -> None:
    statistics = Statistics()
    statistics.add(next(open_run(run).records()))
    assert statistics.sampled_tokens == Totals.of(record).sampled_tokens
    assert statistics.branches.total() == len(record.branches)
    assert "branch, edited" in statistics.table()
