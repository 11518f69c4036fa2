"""What an adapter is examined on was never trained on, and a recovery task begins with a failure
that really happened.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.errors import TaskError
from agent.loop.calls import Dispatcher
from agent.recipe.data import held_out
from agent.recipe.heldout import (
    generated_tasks,
    gsm8k_tasks,
    question,
    recovery_tasks,
    trained_on,
)
from agent.recipe.metrics import given_code
from conversations.template import ChatTemplate
from tests.agent.recipe.test_metrics import record
from tools.registry import load_tools


def gsm8k(path: Path, count: int) -> Path:
    rows = (
        {
            "question": f"Ann has {n} bags of 500 nuts. How many?",
            "answer": f"{n * 500} nuts\n#### {n * 500:,}",
        }
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gsm8k_tasks_are_the_rows_that_are_never_trained_on(tmp_path: Path) -> None:
    tasks = gsm8k_tasks(gsm8k(tmp_path / "train.jsonl", 400), 5)
    assert len(tasks) == 5
    assert all(held_out(question(task)) for task in tasks)
    assert [task.ground_truth for task in tasks] == [
        str(int(question(task).split()[2]) * 500) for task in tasks
    ]


def test_a_file_that_is_not_gsm8k_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(TaskError, match=r"x\.jsonl:1 "):
        gsm8k_tasks(tmp_path / "x.jsonl", 5)


def test_generated_tasks_are_the_same_every_time_and_their_answers_whole_numbers() -> None:
    tasks = generated_tasks(8)
    assert [task.id for task in tasks] == [f"gsm_symbolic-{index}" for index in range(8)]
    assert [question(task) for task in tasks] == [question(task) for task in generated_tasks(8)]
    assert all(str(task.ground_truth).lstrip("-").isdigit() for task in tasks)


def test_questions_of_the_training_data_are_recognized() -> None:
    from reasoning_gym import create_dataset

    from agent.recipe.symbolic import FIRST_TRAINING_SEED

    tasks = generated_tasks(2)
    tasks[1].messages[0]["content"] = create_dataset(
        "gsm_symbolic", size=10, seed=FIRST_TRAINING_SEED
    )[7]["question"]
    assert trained_on(tasks, 10) == {tasks[1].id}


async def test_a_recovery_task_holds_a_program_that_fails_and_what_the_sandbox_said(
    smollm2: ChatTemplate,
) -> None:
    tools = load_tools("gsm8k")
    await tools.start()
    try:
        tasks = await recovery_tasks(
            Dispatcher(tools, max_parallel_calls=1, shorten=lambda text: None), 6
        )
    finally:
        await tools.close()
    assert len(tasks) == 6
    for task in tasks:
        code = given_code(record([], messages=task.messages))
        assert code is not None
        with pytest.raises((ArithmeticError, NameError, SyntaxError, TypeError)) as failure:
            exec(compile(code, "main.py", "exec"), {"print": lambda *_: None})
        assert failure.type.__name__ in task.messages[-1]["content"]
        text = smollm2.decode(
            [token for _, ids in smollm2.prompt(task.messages, tools.schemas) for token in ids]
        )
        assert text.rstrip().endswith("</tool_response><|im_end|>\n<|im_start|>assistant")
        assert (
            "<tool_call>\n"
            + json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
            + "\n</tool_call>"
            in text
        )
