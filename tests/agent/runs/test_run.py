"""What `run` decides before anything starts."""

from __future__ import annotations

from pathlib import Path

from agent.config.config import load_config
from agent.runs.job import RunRequest, with_fresh_seed
from conversations.run.store import RunFolder


def request(out: Path, *, resume: bool) -> RunRequest:
    config = load_config(None, ["rollout.engine_kwargs.sglang.random_seed=5"])
    return RunRequest(
        Path("tasks.jsonl"), out, config, None, resume, force=False, validate=False, argv=[]
    )


def test_each_start_of_a_run_has_a_seed_of_its_own(tmp_path: Path) -> None:
    assert with_fresh_seed(request(tmp_path, resume=False)).config.seed == 5
    assert (
        with_fresh_seed(request(tmp_path, resume=True)).config.seed == 5
    )  # no run there: refused later
    RunFolder.create(tmp_path, {"seed": 5}).close()
    again = with_fresh_seed(request(tmp_path, resume=True)).config
    assert again.verl_rollout()["engine_kwargs"]["sglang"]["random_seed"] == again.seed == 6
    assert (
        again.resolved() == request(tmp_path, resume=True).config.resolved()
    )  # which a resume compares


def test_an_engine_that_has_no_seed_of_ours_gets_none(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {"seed": None}).close()
    assert with_fresh_seed(request(tmp_path, resume=True)).config.seed == 5
