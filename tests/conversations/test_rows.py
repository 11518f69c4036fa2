"""Plain rows and advantages: masks against an oracle that reads text, estimators against figures
worked by hand, and the consumers' own code where it is installed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conversations.advantages import (
    ADVANTAGES,
    ESTIMATORS,
    SavedAdvantages,
    compute,
)
from conversations.errors import RecordError, RunFolderError
from conversations.export import job
from conversations.export.filters import Filters
from conversations.export.groups import Statistics
from conversations.page import build
from conversations.run.open_run import Run, open_run
from conversations.run.store import TRAJECTORIES
from conversations.trajectory import line_hash
from tests.conversations.exports import exported, qwen3_run, small_run

BODY = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def rows_of(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    found: list[dict] = pq.read_table(folder / "rows.parquet").to_pylist()  # type: ignore[type-arg]
    return found


@pytest.fixture
def copied(tmp_path: Path) -> Run:
    """The small run, to write beside."""
    shutil.copytree(small_run().path, tmp_path / "run")
    return open_run(tmp_path / "run")


def test_a_row_has_the_records_tokens_in_lists_of_one_length() -> None:
    folder, done = exported("rows")
    records = {record["id"]: record for record in small_run().records()}
    found = rows_of(folder)
    assert len(found) == done.rows > 40
    for row in found:
        record = records[row["id"]]
        prompt, response = record["prompt_ids"], record["response_ids"]
        assert row["input_ids"] == prompt + response
        assert row["prompt_length"] == len(prompt)
        assert (
            row["loss_mask"]
            == row["assistant_masks"]
            == [0] * len(prompt) + record["response_mask"]
        )
        assert len(row["logprobs"]) == len(row["observation_mask"]) == len(row["input_ids"])
        assert row["logprobs"][len(prompt) :] == record["response_logprobs"]
        assert (row["group"], row["sample"], row["branch"]) == (
            record["task_id"],
            record["sample"],
            0,
        )
        assert row["reward"] == record["reward"]
        assert not any(map(lambda a, b: a and b, row["loss_mask"], row["observation_mask"]))


@pytest.mark.parametrize("which", [small_run, qwen3_run])
def test_the_observation_mask_holds_the_bodies_and_nothing_else(which: object) -> None:
    run: Run = which()  # type: ignore[operator]
    folder, _ = exported("rows", run)
    template = run.template()
    seen = 0
    for row in rows_of(folder):
        after = row["input_ids"][row["prompt_length"] :]
        mask = row["observation_mask"][row["prompt_length"] :]
        spans, start = [], None
        for place, flag in enumerate([*mask, 0]):
            if flag and start is None:
                start = place
            elif not flag and start is not None:
                spans.append(template.decode(after[start:place]))
                start = None
        said = [body.strip() for body in BODY.findall(template.decode(after)) if body.strip()]
        record = run[row["id"]]
        answered = [line for line in record.tool_calls if (line.response or "").strip()]
        assert len(said) <= len(answered)
        assert [span.strip() for span in spans] == said
        seen += len(said)
    assert seen > 20


def test_weight_versions_cover_the_sampled_tokens() -> None:
    folder, _ = exported("rows")
    for row in rows_of(folder):
        covered = [
            place for span in row["weight_versions"] for place in range(span["start"], span["end"])
        ]
        assert covered == [place for place, flag in enumerate(row["loss_mask"]) if flag]


# ---------------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [1.5, -0.5, -0.5, -0.5]),  # mean 0.25, std of the sample 0.5
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("leave-one-out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_estimators_by_hand(name: str, expected: list[float]) -> None:
    assert ESTIMATORS[name]([1.0, 0.0, 0.0, 0.0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reward", [1.0, 0.1, 0.7, -0.2, 1e30])
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_group_without_spread_has_advantage_0(name: str, count: int, reward: float) -> None:
    assert ESTIMATORS[name]([reward] * count) == [0.0] * count


def test_only_whole_groups_have_advantages(copied: Run) -> None:
    counts, file = compute(copied, "grpo")
    assert file == copied.path / ADVANTAGES
    saved = SavedAdvantages(copied.path)
    whole = 0
    for _, members in copied.groups():
        values = [saved.of({"id": one.id, "sha256": _sha256(copied, one.id)}) for one in members]
        if any(one.infra_error or one.reward is None for one in members):
            assert set(values) == {None}
        else:
            whole += 1
            assert sum(value for value in values if value is not None) == pytest.approx(0, abs=1e-4)
            assert None not in values
    assert counts.groups - counts.incomplete == whole > 0
    assert counts.incomplete > 0


def _sha256(run: Run, name: str) -> str:
    return str(run.record(name)["sha256"])


def test_the_export_the_statistics_and_the_page_show_advantages(
    copied: Run, tmp_path: Path
) -> None:
    counts, _ = compute(copied, "rloo")
    done = job.export_run(copied, "rows", tmp_path / "out")
    given = [row["advantage"] for row in rows_of(tmp_path / "out") if row["advantage"] is not None]
    assert 0 < len(given) <= counts.trajectories
    assert not any("advantage" in note for note in done.notes)
    statistics, saved = Statistics(), SavedAdvantages(copied.path)
    for record in copied.records(check=False):
        statistics.add(record)
        statistics.add_advantage(saved.of(record))
    assert statistics.table()["advantages"].startswith(f"{counts.trajectories},")
    with build(copied) as with_them, build(small_run()) as without:
        assert with_them.blocks.size > without.blocks.size


def test_a_run_without_advantages_says_so() -> None:
    folder, done = exported("rows")
    assert {row["advantage"] for row in rows_of(folder)} == {None}
    assert any("turntrace advantages" in note for note in done.notes)


def test_groups_without_spread_are_left_out_and_counted(tmp_path: Path) -> None:
    done = job.export_run(small_run(), "rows", tmp_path / "out", Filters(mixed_groups=True))
    groups = {row["group"] for row in rows_of(tmp_path / "out")}
    rewards = {
        name: {one.reward for one in members if not one.infra_error and one.reward is not None}
        for name, members in small_run().groups()
    }
    assert all(len(rewards[name]) > 1 for name in groups)
    assert done.dropped["group's rewards are all equal"] > 0


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '{"id": "x"}', '{"id": 1, "sha256": 2, "advantage": true}', "[" * 9999]
)
def test_a_foreign_line_counts_as_absent(copied: Run, line: str) -> None:
    (copied.path / ADVANTAGES).write_text('{"estimator": "grpo"}\n' + line + "\n")
    saved = SavedAdvantages(copied.path)
    assert all(saved.of(record) is None for record in copied.records(check=False))


def test_an_advantage_of_another_state_of_a_record_is_none(copied: Run) -> None:
    record = next(copied.records())
    line = {"id": record["id"], "sha256": "0" * 64, "advantage": 1.0}
    (copied.path / ADVANTAGES).write_text("{}\n" + json.dumps(line) + "\n")
    assert SavedAdvantages(copied.path).of(record) is None


@pytest.mark.parametrize(("name", "size"), [("ppo", None), ("grpo", 1)])
def test_what_cannot_be_computed_is_refused(copied: Run, name: str, size: int | None) -> None:
    with pytest.raises(RunFolderError):
        compute(copied, name, size)


@pytest.mark.parametrize("reward", ["1.0", 10**400, True, [1.0]])
def test_a_reward_that_is_no_number_is_named(copied: Run, reward: object) -> None:
    lines = [json.loads(line) for line in (copied.path / TRAJECTORIES).read_text().splitlines()]
    odd = next(line for line in lines if line["reward"] is not None)
    odd["reward"] = reward
    odd["sha256"] = line_hash(odd)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (copied.path / TRAJECTORIES).write_text(text)
    with pytest.raises(RecordError, match=f"{odd['id']}: reward"):
        compute(open_run(copied.path), "grpo")


def test_a_huge_advantage_of_a_foreign_line_counts_as_absent(copied: Run) -> None:
    record = next(copied.records())
    line = {"id": record["id"], "sha256": record["sha256"], "advantage": 10**400}
    (copied.path / ADVANTAGES).write_text("{}\n" + json.dumps(line) + "\n")
    assert SavedAdvantages(copied.path).of(record) is None
