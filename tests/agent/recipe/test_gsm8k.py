"""Programs come from worked answers, print the answer, and follow their story when its numbers
change.
"""

from __future__ import annotations

from random import Random

import pytest

from agent.recipe.gsm8k import from_gsm8k, with_other_numbers
from agent.recipe.programs import Problem, Step, prints

QUESTION = "Ann sold 48 clips in April, and half as many in May. How many did she sell?"
ANSWER = (
    "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips "
    "altogether.\n#### 72"
)


def test_a_worked_answer_becomes_named_steps_that_use_one_another() -> None:
    problem = from_gsm8k(QUESTION, ANSWER)
    assert problem is not None
    assert (
        problem.code
        == "clips_in_may = 48 // 2\nclips_altogether = 48 + clips_in_may\nprint(clips_altogether)"
    )
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
