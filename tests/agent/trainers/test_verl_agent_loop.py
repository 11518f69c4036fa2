"""TurntraceAgentLoop in the real verl 0.9.1 and 0.8.0, each in an environment of its own; the cases
are `verl09/cases.py`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.agent.verl09 import environment
from tests.helpers import ROOT

pytestmark = pytest.mark.slow


CASES = "tests/agent/verl09/cases.py"


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("0.9.1", [CASES, "tests/conversations/test_template.py"]),
        ("0.8.0", [CASES]),
    ],  # 0.9.1 comes with transformers 5
)
def test_every_case(version: str, files: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment.variables(version),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
