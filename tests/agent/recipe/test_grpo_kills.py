"""A GRPO run is killed at some moment; the same command goes on to the whole run.

verl's trainer is stood in for by a program that does to the files what it does, in its order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.recipe.grpo.report import read_report
from agent.recipe.grpo.settings import Layout
from tests.agent.recipe.test_grpo import gsm8k
from tests.agent.recipe.verl_stand_in import install
from tests.helpers import ROOT, child_env

STEPS = 6
MOMENTS = [
    "first validation 0",
    "sampling 1",
    "model saved 2",
    "extra_state saved 2",
    "naming 2",
    "sampling 4",
    "optim saved 4",
    "naming 4",
    "removed after 6",
    "naming 6",
    "validating 6",
    "telling 6",
]
"""Checkpoints are made after steps 2, 4 and 6; the last two are kept."""
WHOLE_BEFORE_TOLD = {"naming 2": [2], "naming 4": [4], "naming 6": [6], "validating 6": [6],
                     "telling 6": [6]}  # fmt: skip
"""Moments after which a step is not done again, although verl had not written its metrics."""


class _Run:
    """The command, as often as a test starts it."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder / "run")
        self._model = folder / "model"
        self._model.mkdir()
        (self._model / "config.json").write_text("{}")
        self._data = gsm8k(folder / "train.jsonl", 60)
        self._verl = install(folder / "verl-package")

    def start(self, stops: str = "", *more: str) -> subprocess.Popen[str]:
        sizes = ("--steps", str(STEPS), "--save-every", "2", "--test-every", "3", "--prompts", "4")
        words = (str(self._data), "--out", str(self.layout.root), "--model", str(self._model))
        paths = os.pathsep.join([str(self._verl), str(ROOT)])
        return subprocess.Popen(
            [sys.executable, "-m", "agent.recipe.grpo", "train", *words, *sizes, "--held-out", "4",
             *more],
            env=child_env({"PYTHONPATH": paths, "STAND_IN_STOPS": stops}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def stopped(self, process: subprocess.Popen[str]) -> int:
        """The trainer's process id, once it has reached the moment that it stops at."""
        file = self.layout.root / "stopped"
        _until(lambda: process.poll() is not None or (file.is_file() and file.read_text() != ""))
        assert process.poll() is None, process.communicate()
        trainer = int(file.read_text())
        file.unlink()
        return trainer


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def _is_gone(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_goes_on_after_a_kill(tmp_path: Path, moment: str) -> None:
    run = _Run(tmp_path)
    first = run.start(moment)
    trainer = run.stopped(first)
    first.kill()
    first.communicate()
    _until(lambda: _is_gone(trainer))
    again = run.start()
    said, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    folders = Counter(int(one.name.split("-")[1]) for one in run.layout.steps.iterdir())
    assert folders == dict.fromkeys(range(STEPS + 1), 1)  # none sampled twice, none lost
    report = read_report(run.layout)
    assert {3, 6} <= {
        step for step, found in report.metrics.items() if any("val-" in name for name in found)
    }
    timed = [step for step, found in report.metrics.items() if "timing_s/step" in found]
    untold = {*WHOLE_BEFORE_TOLD.get(moment, ())}
    assert timed == [step for step in range(1, STEPS + 1) if step not in untold]
    assert "| 5 | 0.050 |" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["sigterm", "ctrl-c"]
)
def test_a_stopped_command_stops_the_trainer(tmp_path: Path, number: int, code: int) -> None:
    run = _Run(tmp_path)
    process = run.start("sampling 4")
    trainer = run.stopped(process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error == "stopped; the same command goes on from the last checkpoint\n"
    assert _is_gone(trainer)


def test_a_run_that_is_done_starts_no_trainer(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    assert run.start().wait(120) == 0
    folders = sorted(run.layout.steps.iterdir())
    again = run.start("first validation 6")  # it would hang
    said, error = again.communicate(timeout=60)
    assert (again.returncode, error) == (0, "")
    assert f"| {STEPS} | 0.060 |" in said
    assert sorted(run.layout.steps.iterdir()) == folders
    assert len(run.layout.metrics()) == 1


def test_another_model_or_other_data_is_another_run(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    assert run.start().wait(120) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    process = run.start("", "--model", str(other))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert f"model {tmp_path / 'model'} (now {other})" in error
    gsm8k(tmp_path / "train.jsonl", 63)
    process = run.start()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "data_sha256" in error
