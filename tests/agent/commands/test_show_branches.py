"""`turntrace show` and `verify` on a session with branches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import turntrace
from tests.conversations.session.sessions import session_run
from tests.helpers import hermes_template


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_run(tmp_path_factory.mktemp("session") / "run", hermes_template())


def test_the_tree_and_one_branch_are_shown(run: Path) -> None:
    shown = turntrace("show", str(run), "t-0", cwd=run).stdout
    assert "> 0   trunk" in shown
    assert "1   resampled after turn 1 of 0" in shown
    assert "run by the agent program" in shown
    branch = turntrace("show", str(run), "t-0", "--branch", "1", "--tokens", cwd=run).stdout
    assert "Another sample." in branch
    assert "Be brief." in branch
    assert "It is cut" not in branch


def test_a_branch_that_is_not_there_is_named(run: Path) -> None:
    ran = turntrace("show", str(run), "t-0", "--branch", "70", cwd=run)
    assert ran.returncode
    assert "no branch 70" in ran.stdout + ran.stderr


def test_verify_has_no_defect_and_counts_all_turns(run: Path) -> None:
    ran = turntrace("verify", str(run), "--json", cwd=run)
    verdict = json.loads(ran.stdout.splitlines()[-1])
    assert (ran.returncode, verdict["defects"]) == (0, 0)
    assert verdict["counts"]["branches"] == 7
    assert verdict["counts"]["turns"] == 14
