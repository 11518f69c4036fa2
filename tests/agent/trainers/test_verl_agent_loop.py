"""TurntraceAgentLoop in the real verl 0.9.1 and 0.8.0, each in an environment of its own.

The cases are `verl09/cases.py`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.agent import overlay
from tests.helpers import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "tests" / "agent" / "verl09"
CASES = "tests/agent/verl09/cases.py"


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("0.9.1", [CASES, "tests/conversations/test_template.py"]),  # with transformers 5
        ("0.8.0", [CASES]),
    ],
)
def test_every_case(version: str, files: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=overlay.variables(FOLDER / f"verl-{version}.txt"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
