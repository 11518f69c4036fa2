"""Generated problems to practise on: rows in GSM8K's format, for training by rewards.

They come from seeds that neither an adapter's training nor `evaluate` draws from. The templates are
the same hundred: other names or other numbers, no other kinds of problems.
"""

from __future__ import annotations

from agent.commands.tasks_work import whole_number
from agent.loop.tasks import Row
from agent.recipe import data, symbolic

FIRST_SEED = 2_000_000_000


def practice_rows(count: int, trained_on: int = data.FULL.generated) -> list[Row]:
    """`count` problems drawn; each question once, and none of the first `trained_on` that an
    adapter's training asks.

    `answer` is the final line alone: there is no worked answer.
    """
    trained = _drawn(trained_on, symbolic.FIRST_TRAINING_SEED)
    return [
        {"question": question, "answer": f"#### {answer}"}
        for question, answer in _drawn(count, FIRST_SEED).items()
        if question not in trained
    ]


def _drawn(count: int, seed: int) -> dict[str, str]:
    """Answers by question."""
    rows = symbolic.drawn(count, seed)
    return {row["question"].strip(): whole_number(row["answer"]) for row in rows}
