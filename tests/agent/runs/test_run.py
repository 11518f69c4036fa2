"""What `run` decides before anything starts."""

from __future__ import annotations

from pathlib import Path

from agent.config.config import load_config
from agent.runs.manifest import fresh_seed
from conversations.run.store import RunFolder

CONFIG = load_config(None, ["rollout.engine_kwargs.sglang.random_seed=5"])


def test_each_start_of_a_run_has_a_seed_of_its_own(tmp_path: Path) -> None:
    assert fresh_seed(CONFIG, tmp_path).seed == 5  # no run there: refused later
    RunFolder.create(tmp_path, {"seed": 5}).close()
    again = fresh_seed(CONFIG, tmp_path)
    assert again.verl_rollout()["engine_kwargs"]["sglang"]["random_seed"] == again.seed == 6
    assert again.resolved() == CONFIG.resolved()  # which a resume compares


def test_an_engine_that_has_no_seed_of_ours_gets_none(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {"seed": None}).close()
    assert fresh_seed(CONFIG, tmp_path).seed == 5
