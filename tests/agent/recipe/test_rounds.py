"""Rounds without a trainer, as far as no model is needed.

The whole of it: `python -m agent.recipe rounds DATA --out DIR`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from agent.commands.run_work import RunRequest, open_folder, prepare_run
from agent.config.config import load_config
from agent.errors import AgentError
from agent.recipe.rounds import (
    SMALL_ROUNDS,
    RoundResult,
    Score,
    SelfTraining,
    is_whole,
    rounds_table,
    tokens_of,
)
from agent.runs.manifest import parent_entry
from conversations.page import parent_of
from conversations.run.open_run import open_run
from conversations.run.store import RunFolder
from conversations.verify import verify_run
from tests.agent.recipe.test_grpo import gsm8k
from tests.conversations.exports import exported, small_run
from tests.helpers import ROOT


def test_training_data_are_the_exported_ids_and_masks() -> None:
    folder, _ = exported("rows")
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    tokens = tokens_of(rows)
    assert len(tokens.starts) == len(rows) + 1
    for place, row in enumerate(rows):
        start, end = tokens.starts[place], tokens.starts[place + 1]
        assert tokens.ids[start:end].tolist() == row["input_ids"]
        assert tokens.loss[start:end].tolist() == row["loss_mask"]
    assert not tokens.held_out.any()
    assert int(tokens.loss.sum()) == sum(sum(row["loss_mask"]) for row in rows)
    batch = tokens.batch(np.arange(2), "cpu")
    assert batch.learned.numel() == sum(sum(row["loss_mask"]) for row in rows[:2])


def test_a_round_that_kept_nothing_says_so() -> None:
    with pytest.raises(AgentError, match="nothing"):
        tokens_of([])


def test_scores_leave_out_what_infrastructure_failed() -> None:
    score = Score(0.0)
    for one in small_run():
        score.add(one)
    healthy = [one for one in small_run() if not one.infra_error]
    failed = [one for one in healthy if any(call.status != "ok" for call in one.tool_calls)]
    assert score.asked == len(healthy) < len(small_run())
    assert score.failed == len(failed) > 0
    assert 0 <= score.recovered <= score.failed
    assert score.calls == sum(len(one.tool_calls) for one in healthy)


def test_the_table_has_a_line_for_each_model_and_temperature() -> None:
    scores = [Score(0.0, asked=64, right=12, whole=60, calls=130), Score(1.0, asked=64, right=9)]
    text = rounds_table([RoundResult(0, 0, 0, 0, scores), RoundResult(1, 40, 9, 900, scores)])
    assert len(text.splitlines()) == 2 + 4
    assert "12/64 (18.8%) [11.1%, 30.0%]" in text


def test_a_folder_holds_the_rounds_of_one_plan(tmp_path: Path) -> None:
    data, plan = gsm8k(tmp_path / "train.jsonl", 60), replace(SMALL_ROUNDS, rounds=1, tasks=4)
    plan = replace(plan, held_out=4)
    work = SelfTraining(plan, tmp_path / "out", data, "smollm2-tools", Console())
    work.check_plan()
    other = SelfTraining(replace(plan, lr=1.0), tmp_path / "out", data, "smollm2-tools", Console())
    with pytest.raises(AgentError, match="lr "):
        other.check_plan()


def test_other_data_or_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    data, plan = gsm8k(tmp_path / "train.jsonl", 60), replace(SMALL_ROUNDS, rounds=1, tasks=4)
    plan, root = replace(plan, held_out=4), tmp_path / "out"
    SelfTraining(plan, root, data, "smollm2-tools", Console()).check_plan()
    gsm8k(data, 63)
    with pytest.raises(AgentError, match="data_sha256"):
        SelfTraining(plan, root, data, "smollm2-tools", Console()).check_plan()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(AgentError, match=r"thesis\.txt"):
        SelfTraining(plan, other, data, "smollm2-tools", Console()).check_plan()
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_an_answer_counts_only_if_the_model_ended_the_conversation() -> None:
    right = next(one for one in small_run() if one.reward == 1.0 and one.stop_reason == "stop")
    cut_off = replace(right, stop_reason="length")
    score = Score(0.0)
    for one in (right, cut_off):
        score.add(one)
    assert (score.asked, score.right) == (2, 1)


def stage_request(tmp_path: Path, out: Path, **more: object) -> RunRequest:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "What is 1 plus 1?"}\n')
    return RunRequest(
        tasks=tasks, out=out, config=load_config(None), limit=None, resume=False, force=False,
        validate=False, argv=("run",), more=more,
    )  # fmt: skip


def test_a_stages_run_folder_names_the_stage_before_and_its_step(tmp_path: Path) -> None:
    named = parent_entry(small_run().path)
    request = stage_request(tmp_path, tmp_path / "run", follows=named, step=2)
    with open_folder(prepare_run(request)):
        pass
    manifest = open_run(tmp_path / "run").manifest
    assert (manifest["follows"], manifest["step"], manifest["parent"]) == (named, 2, None)


def test_a_stage_passes_verify_and_is_shown_beside_the_stage_before(tmp_path: Path) -> None:
    shutil.copytree(small_run().path, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    manifest = {**json.loads(file.read_text()), "step": 2}
    file.write_text(json.dumps({**manifest, "follows": parent_entry(small_run().path)}))
    defects: list[object] = []
    verify_run(tmp_path / "run", on_defect=defects.append)
    assert defects == []
    before = parent_of(open_run(tmp_path / "run"))
    assert before is not None
    assert before.path == small_run().path


def test_a_stage_that_is_done_is_not_touched_again(tmp_path: Path) -> None:
    """Its run.json has a hash, which the next round's stage names."""
    run = small_run()
    tasks = tmp_path / "tasks.jsonl"
    healthy = [one for one in run if not one.infra_error][:6]
    manifest = {"counts": None}
    with RunFolder.create(tmp_path / "run", manifest) as folder:
        for one in healthy:
            folder.append(one)
        tasks.write_text("{}\n" * 6)
        assert not is_whole(tmp_path / "run", tasks, 1)  # it is not closed yet
        folder.close({"finished": 6})
    assert is_whole(tmp_path / "run", tasks, 1)
    assert not is_whole(tmp_path / "run", tasks, 2)
    assert not is_whole(tmp_path / "none", tasks, 1)
    failed = next(one for one in run if one.infra_error)
    with RunFolder.create(tmp_path / "failed", manifest) as folder:
        for one in (*healthy[:5], failed):
            folder.append(one)
        folder.close({"finished": 6})
    assert not is_whole(tmp_path / "failed", tasks, 1)


def test_rounds_do_not_share_tasks_and_need_enough_of_them(tmp_path: Path) -> None:
    data = gsm8k(tmp_path / "train.jsonl", 60)
    plan = replace(SMALL_ROUNDS, rounds=20, held_out=4)
    with pytest.raises(AgentError, match="need more"):
        SelfTraining(plan, tmp_path / "out", data, "smollm2-tools", Console())


@pytest.mark.parametrize(
    ("model", "override"),
    [("nobody/nothing", ""), ("sharded", ""), ("smollm2-base", "rollout.nothing=1")],
)
def test_a_users_mistake_leaves_no_plan(tmp_path: Path, model: str, override: str) -> None:
    """The same command with the mistake put right would be refused."""
    data = gsm8k(tmp_path / "train.jsonl", 60)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "config.json").write_text("{}")
    plan = replace(SMALL_ROUNDS, rounds=1, tasks=4, held_out=4)
    named = str(tmp_path / model) if model == "sharded" else model
    overrides = [override] if override else []
    work = SelfTraining(plan, tmp_path / "out", data, named, Console(), overrides)
    with pytest.raises(AgentError):
        work.run(lambda done: None)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_missing_file_in_one_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "agent.recipe", "rounds")
    words = (str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"), "--preset", "full")
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none.jsonl'} cannot be read")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_training_of_what_are_no_token_ids_is_refused_in_one_line(tmp_path: Path) -> None:
    data = gsm8k(tmp_path / "train.jsonl", 6)
    command = (sys.executable, "-m", "agent.recipe", "train", str(data))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {data} is no file of token ids")
    assert len(done.stderr.splitlines()) == 1
