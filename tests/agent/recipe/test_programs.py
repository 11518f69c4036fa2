"""Programs print what they claim, fail as the interpreter fails, and nothing but arithmetic is ever
run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from agent.recipe import symbolic
from agent.recipe.faults import broken_code
from agent.recipe.programs import number_text, prints, run_arithmetic


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "open('x')\n().x",
        "print.__self__",
        "x = 2 ** 99999",
        "f = lambda: 1",
        "a = open\na('x')",
        "__builtins__",
    ],
)
def test_only_arithmetic_is_run(code: str) -> None:
    with pytest.raises(ValueError, match="not arithmetic"):
        run_arithmetic(code)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72.0\n", "72"),
        ("1,250", "1250"),
        ("0.30000000000000004", "0.3"),
        ("-5", "-5"),
        ("nan", None),
        ("x", None),
    ],
)
def test_numbers_are_written_as_answers_are(text: str, number: str | None) -> None:
    assert number_text(text) == number


def test_tracebacks_are_the_interpreters_own(tmp_path: Path) -> None:
    code, rng = "clips = 48\nhalf = clips // 2\ntotal = clips + half\nprint(total)", Random(5)
    for broken, told in filter(None, (broken_code(code, rng) for _ in range(12))):
        (tmp_path / "main.py").write_text(broken)
        real = subprocess.run(
            [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert real.returncode != 0
        assert real.stdout + real.stderr.replace(f"{tmp_path}/", "") == told


def test_every_generated_problem_has_a_program_of_its_own_steps() -> None:
    found = list(symbolic.problems(200))
    assert len(found) >= 190
    assert all(prints(problem.code, problem.answer) for problem in found)
    assert all(len(problem.steps) >= 2 for problem in found), (
        "an answer that is merely stated teaches nothing"
    )


def test_training_and_held_out_seeds_never_meet() -> None:
    assert max(symbolic.HELD_OUT_SEEDS) < symbolic.FIRST_TRAINING_SEED
