"""Programs come from worked answers, print what they claim, and nothing but arithmetic is ever run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from agent.model.recipe import symbolic
from agent.model.recipe.faults import broken_code
from agent.model.recipe.programs import Problem, Step, from_gsm8k, number_text, prints, run, with_other_numbers

QUESTION = "Ann sold 48 clips in April, and half as many in May. How many did she sell?"
ANSWER = "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


def test_a_worked_answer_becomes_named_steps_that_use_one_another() -> None:
    problem = from_gsm8k(QUESTION, ANSWER)
    assert problem is not None
    assert problem.code == "clips_in_may = 48 // 2\nclips_altogether = 48 + clips_in_may\nprint(clips_altogether)"
    assert prints(problem.code, "72")


@pytest.mark.parametrize(
    "answer",
    [
        "no annotation\n#### 72",
        "48/2 = <<48/2=24>>24 clips\n#### 72",  # prints another number
        "<<__import__('os').getpid()=1>>1\n#### 1",
        "<<9**9**9=1>>1\n#### 1",
        "48+24+77 = <<48+24+77=149>>149\n#### 149",  # 24 and 77 come from nowhere
    ],
)
def test_an_answer_that_makes_no_true_program_is_left_out(answer: str) -> None:
    assert from_gsm8k(QUESTION, answer) is None


def test_other_numbers_change_story_program_and_answer_together() -> None:
    problem = from_gsm8k(QUESTION, ANSWER)
    assert problem is not None
    other = with_other_numbers(problem, Random(3))
    assert other is not None
    first = int(other.code.split("= ")[1].split(" //")[0])
    assert f"sold {first} clips" in other.question
    assert first % 2 == 0, "half of it was whole and stays whole"
    assert other.answer == str(first + first // 2) != "72"
    assert prints(other.code, other.answer)


def test_a_number_nobody_told_is_not_left_behind_when_the_others_change() -> None:
    stale = Problem("Ann has 48 clips.", (Step("all_clips", "48 + 24777"),), "24825", "gsm8k")
    assert with_other_numbers(stale, Random(1)) is None


@pytest.mark.parametrize(
    "code", ["import os", "open('x')\n().x", "print.__self__", "x = 2 ** 99999", "f = lambda: 1", "a = open\na('x')", "__builtins__"]
)
def test_only_arithmetic_is_run(code: str) -> None:
    with pytest.raises(ValueError, match="not arithmetic"):
        run(code)


@pytest.mark.parametrize(
    ("text", "number"), [("72.0\n", "72"), ("1,250", "1250"), ("0.30000000000000004", "0.3"), ("-5", "-5"), ("nan", None), ("x", None)]
)
def test_numbers_are_written_as_answers_are(text: str, number: str | None) -> None:
    assert number_text(text) == number


def test_tracebacks_are_the_interpreters_own(tmp_path: Path) -> None:
    code, rng = "clips = 48\nhalf = clips // 2\ntotal = clips + half\nprint(total)", Random(5)
    for broken, told in filter(None, (broken_code(code, rng) for _ in range(12))):
        (tmp_path / "main.py").write_text(broken)
        real = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert real.returncode != 0
        assert real.stdout + real.stderr.replace(f"{tmp_path}/", "") == told


def test_every_generated_problem_has_a_program_of_its_own_steps() -> None:
    found = list(symbolic.problems(200))
    assert len(found) >= 190
    assert all(prints(problem.code, problem.answer) for problem in found)
    assert all(len(problem.steps) >= 2 for problem in found), "an answer that is merely stated teaches nothing"


def test_training_and_held_out_seeds_never_meet() -> None:
    assert max(symbolic.HELD_OUT_SEEDS) < symbolic.FIRST_TRAINING_SEED
