"""`turntrace verify`: a line a defect, a summary, exit codes 0, 1 and 2, JSON lines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conversations.run.store import TRAJECTORIES
from tests.command import turntrace
from tests.conversations.synthetic import make_run


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return turntrace("verify", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", 12)


def test_a_good_run(run: Path) -> None:
    done = verify(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run}: 12 trajectories, ")
    assert done.stdout.endswith(" tool calls: no defects\n")


def test_a_changed_run(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "run.json").write_bytes((run / "run.json").read_bytes())
    lines = (run / TRAJECTORIES).read_text().splitlines()
    changed = json.loads(lines[4])
    changed["prompt_ids"][3] += 1
    lines[4] = json.dumps(changed)
    (copied / TRAJECTORIES).write_text("".join(f"{line}\n" for line in lines))
    (copied / "tokenizer").symlink_to(run / "tokenizer")
    done = verify(copied, "--jobs", "2")
    assert (done.returncode, done.stderr) == (1, "")
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(
        f"trajectories.jsonl:5 trajectory {changed['id']}: the record does not match its hash"
    )
    assert second.startswith(f"trajectories.jsonl:5 trajectory {changed['id']} token 3: ")
    assert summary.endswith(": 2 defects")
    as_json = verify(copied, "--json")
    told = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert as_json.returncode == 1
    _, defect, verdict = told
    assert {key: defect[key] for key in ("file", "line", "trajectory", "turn", "token")} == {
        "file": TRAJECTORIES,
        "line": 5,
        "trajectory": changed["id"],
        "turn": None,
        "token": 3,
    }
    assert (verdict["ok"], verdict["defects"], verdict["notes"]) == (False, 2, [])
    assert verdict["counts"]["done"] == sum(verdict["counts"]["stop_reasons"].values()) == 12


def test_no_run(tmp_path: Path) -> None:
    done = verify(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} holds no run: there is no run.json\n"
