"""TurntraceAgentLoop in the real verl 0.9.1 and 0.8.0, each in an environment of its own.

The cases are `verl09/cases.py`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.agent import overlay
from tests.helpers import ROOT

pytestmark = [pytest.mark.stack, pytest.mark.slow]

FOLDER = ROOT / "tests" / "agent" / "verl09"
CASES = "tests/agent/verl09/cases.py"
IMAGES = "tests/agent/verl09/image_cases.py"
TEMPLATES = "tests/conversations/test_template.py"
WHERE_THE_TOKENIZER_COUNTS = (
    "not test_template.py or deltas_are_what or prompt_is_what or raw_is_the_tokenizers or end_and"
    " or named_templates or next_roles or blanks_between"
)
"""Of the templates' tests, those that the class of a tokenizer may change."""


@pytest.mark.parametrize(
    ("version", "files"),
    [
        # With transformers 5.
        ("0.9.1", [CASES, IMAGES, TEMPLATES, "-k", WHERE_THE_TOKENIZER_COUNTS]),
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
