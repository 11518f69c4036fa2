"""`kill -9` at random moments of a run, then resume: nothing is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversations.run.store import (
    SUPERSEDED,
    TRAJECTORIES,
    UNFINISHED,
    read_manifest,
    read_trajectories,
)
from conversations.trajectory import Trajectory, read_record
from tests.helpers import ROOT

KILLS = int(os.environ.get("TURNTRACE_KILLS", "14"))
TASKS = 80 * KILLS
KILLED = -signal.SIGKILL


class Driver:
    """The process that forks a run for us to kill."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.agent.kill_driver", str(folder), str(TASKS)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, seed: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"go {seed}\n")
        self.process.stdin.flush()
        return int(self.line())

    def exit_code(self) -> int:
        return int(self.line())


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    started = Driver(tmp_path / "run")
    try:
        yield started
    finally:
        started.process.communicate()


def whole_lines(file: Path) -> list[str]:
    content = file.read_text() if file.exists() else ""
    return content.splitlines()[: content.count("\n")]


def finished(folder: Path) -> dict[str, str]:
    """The lines of conversations that need not run again, each checked against its hash."""
    records = {line: read_record(line) for line in whole_lines(folder / TRAJECTORIES)}
    return {record["id"]: line for line, record in records.items() if not record["infra_error"]}


def wait_for_growth(file: Path) -> None:
    """Returns when the file has grown. A resume that retires lines may shrink it first."""
    size = file.stat().st_size if file.exists() else 0
    until = time.monotonic() + 60
    while time.monotonic() < until:
        now = file.stat().st_size if file.exists() else 0
        if now > size:
            return
        size = now
        time.sleep(0.002)


def wait_for_another(file: Path) -> None:
    """Returns when the file has grown by a conversation that need not run again."""
    before = _done(file)
    until = time.monotonic() + 120
    while _done(file) <= before:
        assert time.monotonic() < until, f"{file} holds no other finished conversation after 120 s"
        wait_for_growth(file)


def _done(file: Path) -> int:
    return file.read_bytes().count(b'"infra_error":false') if file.exists() else 0


def test_killed_at_random_moments_nothing_is_lost_and_nothing_is_there_twice(
    driver: Driver, tmp_path: Path
) -> None:
    rng = random.Random(9)
    folder = tmp_path / "run"
    kept: dict[str, str] = {}
    grew = 0
    for attempt in range(KILLS):
        child = driver.start(attempt)
        if attempt % 2:  # while it writes
            wait_for_another(folder / TRAJECTORIES)
        time.sleep(rng.random() ** 2 * 0.2)  # at once, while it resumes, while it runs
        os.kill(child, signal.SIGKILL)
        assert driver.exit_code() == KILLED, (
            "the run was over before it was killed: give it more tasks"
        )
        now = finished(folder)
        assert kept.items() <= now.items()  # what was written stays as it was written
        grew += len(now) > len(kept)
        kept = now
    assert grew >= 5
    assert 0 < len(kept) < TASKS

    for attempt in range(20):  # now let it end; what the engine failed at is tried again
        driver.start(KILLS + attempt)
        assert driver.exit_code() == 0
        if len(finished(folder)) == TASKS:
            break
    trajectories = list(read_trajectories(folder))
    assert Counter(record.task_id for record in trajectories) == {
        f"task{number}": 1 for number in range(TASKS)
    }
    assert {record.stop_reason for record in trajectories} == {"stop"}
    assert {record.num_turns for record in trajectories} == {3}
    assert kept.items() <= {record.id: record.to_line() for record in trajectories}.items()
    assert whole_lines(folder / UNFINISHED) == []
    assert read_manifest(folder)["counts"] == {"done": TASKS}

    set_aside = [Trajectory.from_line(line) for line in whole_lines(folder / SUPERSEDED)]
    assert {record.stop_reason for record in set_aside} == {"engine_error"}
    assert len({record.to_line() for record in set_aside}) == len(set_aside)
    assert (folder / SUPERSEDED).read_bytes().endswith(b"\n")
    assert json.loads((folder / "run.json").read_text())["n"] == 1
