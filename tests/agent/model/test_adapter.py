"""The adapter that ships does what the demo needs of it, on the real engine and in the real
sandbox.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.commands.tasks_work import write_gsm_symbolic
from agent.model.base import ADAPTER_DIR
from agent.recipe.metrics import scores
from conversations.run.store import read_trajectories

REPO = Path(__file__).parents[3]


def test_it_is_small_enough_to_ship() -> None:
    assert (ADAPTER_DIR / "adapter_model.safetensors").stat().st_size <= 6_000_000


@pytest.mark.engine
def test_it_completes_the_protocol_on_problems_it_never_saw(tmp_path: Path) -> None:
    """Through the command, in a process of its own: one engine start, and none of it is left."""
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    write_gsm_symbolic(tasks, 2, seed=0)
    command = [
        sys.executable,
        "-m",
        "agent",
        "run",
        tasks,
        "--out",
        out,
        "--tools",
        "gsm8k",
        "--set",
        "rollout.do_sample=false",
    ]
    ran = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = scores(list(read_trajectories(out)))
    assert found.valid_calls.value == 1.0
    assert (found.complete.part, found.complete.whole) == (2, 2)
    assert found.right.part >= 1
