"""Rewards anew: only they change, whoever's function it is; its errors name the trajectory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.commands.rescore_work import rescore_run
from agent.errors import AgentError
from conversations.errors import RunFolderError
from conversations.run.open_run import open_run
from conversations.run.store import TRAJECTORIES, RunFolder
from conversations.trajectory import Trajectory
from tests.command import turntrace
from tests.conversations.test_trajectory import trajectory
from tests.helpers import hermes_template

COUNT = 40
FUNCTIONS = """
import numpy

def length(trajectory):
    return len(trajectory.response_ids)

def parts(trajectory):
    return {"long": numpy.float32(0.5), "turns": True, "sample": trajectory.sample}

def nothing(trajectory):
    return None

def by_sample(trajectory):
    return None if trajectory.sample % 2 else 1

def raises(trajectory):
    if trajectory.sample == 7:
        raise ValueError("oh\\nno")
    return 0.0

def wrong(trajectory):
    return "1.0"

def nan(trajectory):
    return float("nan")

def huge(trajectory):
    return {"a": 1.7e308, "b": 1.7e308}

def exits(trajectory):
    raise SystemExit(3)

async def later(trajectory):
    return 1.0

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "desk"
    assert (extra_info["split"], extra_info["num_turns"]) == ("train", 1)
    assert "<|im_end|>" not in solution_str
    return {"score": float("42" in solution_str) + float(ground_truth), "acc": True}

def bare_score(data_source, solution_str, ground_truth):
    return 0.25
"""


def record(sample: int, **fields: Any) -> Trajectory:
    template = hermes_template()
    ids = [*template.encode("It is 42."), template.end_id]
    fields = {
        "data_source": "desk",
        "ground_truth": "3",
        "extra": {"extra_info": {"split": "train"}},
        "response_ids": ids,
        **fields,
    }
    return trajectory(id=f"t-{sample}", task_id="t", sample=sample, **fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which two trajectories failed by infrastructure, one of them a fork."""
    folder = tmp_path_factory.mktemp("rescore")
    (folder / "scores.py").write_text(FUNCTIONS)
    with RunFolder.create(folder / "run", {"n": COUNT, "tools": "- x", "parent": None}) as store:
        for sample in range(COUNT):
            failed = sample in (3, 4)
            fork = {"run": "r", "id": "x", "turn": 1} if sample == 4 else None
            store.append(
                record(
                    sample,
                    infra_error=failed,
                    reward=None if failed else 0.5,
                    reward_parts={} if failed else {"old": 0.5},
                    parent=fork,
                )
            )
        store.close({"done": COUNT})
    hermes_template().tokenizer.save_pretrained(folder / "run" / "tokenizer")
    return folder / "run"


Score = Callable[..., list[Trajectory]]


@pytest.fixture
def score(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    monkeypatch.chdir(run.parent)

    def scored(function: str, **options: Any) -> list[Trajectory]:
        rescore_run(run, function, tmp_path / "new", **options)
        return list(open_run(tmp_path / "new"))

    return scored


def test_only_the_reward_changes_and_the_parent_is_named(
    score: Score, run: Path, tmp_path: Path
) -> None:
    new = score("scores:length")
    for before, after in zip(open_run(run), new, strict=True):
        fields, expected = json.loads(after.to_line()), json.loads(before.to_line())
        turn = 1 if before.sample == 4 else None
        expected["parent"] = {"run": "run", "id": before.id, "turn": turn}
        if not before.infra_error:
            expected |= {
                "reward": float(len(before.response_ids)),
                "reward_parts": {"reward": float(len(before.response_ids))},
            }
        assert fields.pop("sha256") != expected.pop("sha256")
        assert fields == expected
    manifest = open_run(tmp_path / "new").manifest
    assert manifest["parent"]["run"] == "run"
    assert manifest["rescore"]["reward"] == "scores:length"
    assert (manifest["n"], manifest["tools"], manifest["counts"]["done"]) == (COUNT, "- x", COUNT)
    assert open_run(tmp_path / "new").template().end_id == hermes_template().end_id


def test_counts_and_digest_are_the_new_runs_own(score: Score, run: Path, tmp_path: Path) -> None:
    score("scores:length")
    parent, new = open_run(run).manifest, open_run(tmp_path / "new").manifest
    assert new["counts"]["mean_reward"] == 7.0
    assert new["digest"] != parent["digest"]
    assert "rescore" in new


def test_what_infrastructure_failed_keeps_its_null(score: Score) -> None:
    assert [each.sample for each in score("scores:length") if each.reward is None] == [3, 4]


def test_parts_are_summed_and_none_is_no_reward(score: Score, tmp_path: Path, run: Path) -> None:
    assert [(each.reward, each.reward_parts) for each in score("scores:parts")][2] == (
        3.5,
        {"long": 0.5, "turns": 1.0, "sample": 2.0},
    )
    done = rescore_run(run, "scores:by_sample", tmp_path / "other")
    assert (done.unscored, done.changed, done.progress.mean_reward) == (21, 38, 1.0)
    assert rescore_run(run, "scores:nothing", tmp_path / "none").progress.mean_reward is None


def test_verls_own_signature_is_called_as_verl_calls_it(
    score: Score, tmp_path: Path, run: Path
) -> None:
    assert {each.reward for each in score("scores:compute_score") if not each.infra_error} == {4.0}
    assert (
        rescore_run(
            run, str(run.parent / "scores.py") + ":bare_score", tmp_path / "bare"
        ).progress.mean_reward
        == 0.25
    )


@pytest.mark.slow
def test_several_processes_give_the_same_in_the_same_order(
    score: Score, run: Path, tmp_path: Path
) -> None:
    one = [each.to_line() for each in score("scores:parts")]
    rescore_run(run, "scores:parts", tmp_path / "many", jobs=2)
    assert [each.to_line() for each in open_run(tmp_path / "many")] == one
    with pytest.raises(AgentError, match=r"^[^\n]*t-7: [^\n]*ValueError[^\n]*$"):
        rescore_run(run, "scores:raises", tmp_path / "failed", jobs=2)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            "scores:raises",
            r"trajectory t-7: the reward function failed: ValueError: oh no \(scores.py:18\)",
        ),
        (
            "scores:wrong",
            "trajectory t-0: the reward function failed: TypeError: ",
        ),
        (
            "scores:nan",
            "trajectory t-0: the reward function failed: TypeError: expected a finite number",
        ),
        (
            "scores:huge",
            "trajectory t-0: the reward function failed: ValueError: ",
        ),
        ("scores:exits", "trajectory t-0: the reward function failed: SystemExit: 3"),
        ("os:getcwd", "trajectory t-0: the reward function failed: TypeError"),
        ("scores:later", "an async function"),
        ("scores:missing", "scores has no function 'missing'"),
        ("nobody:length", "importing nobody failed: ModuleNotFoundError"),
        ("nobody.py:length", "importing nobody.py failed: FileNotFoundError"),
        ("length", "write it as module:function, or as file.py:function"),
    ],
)
def test_a_mistake_names_what_is_wrong_and_leaves_no_run(
    score: Score, tmp_path: Path, function: str, says: str
) -> None:
    with pytest.raises(AgentError, match=rf"^[^\n]*{says}[^\n]*$"):
        score(function)
    assert not (tmp_path / "new" / "run.json").exists()
    assert not (tmp_path / "new" / TRAJECTORIES).exists()
    assert len(score("scores:length")) == COUNT


def test_a_damaged_parent_is_refused(score: Score, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (copy / TRAJECTORIES).write_text(
        (copy / TRAJECTORIES).read_text().replace('"reward":0.5', '"reward":0.75', 1)
    )
    with pytest.raises(RunFolderError, match="hash"):
        rescore_run(copy, "scores:length", tmp_path / "new")
    with pytest.raises(AgentError, match="itself"):
        rescore_run(run, "scores:length", run)


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = turntrace(
        "rescore",
        "run",
        "--reward",
        "scores:by_sample",
        "--out",
        str(tmp_path / "new"),
        cwd=run.parent,
    )
    assert (
        done.stdout
        == "40 trajectories scored: 38 rewards changed, 21 are null, mean reward 1.000 over 19: "
        f"{tmp_path / 'new'}\n"
    )
    again = turntrace(
        "rescore",
        "run",
        "--reward",
        "scores:by_sample",
        "--out",
        str(tmp_path / "new"),
        cwd=run.parent,
    )
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
