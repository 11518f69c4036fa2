"""The tasks that an adapter is examined on: problems that its training never saw, asked as a user
would ask them.

Generated problems come from seeds below every training seed, GSM8K's rows from those that
`data.held_out` keeps back, whether or not the recipe could have made a program of them. A recovery
task begins with a program that fails and what the sandbox really said to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from agent.commands.tasks_work import whole_number
from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from agent.loop.tasks import Task
from agent.recipe import symbolic
from agent.recipe.data import held_out, read_gsm8k
from agent.recipe.faults import broken_code
from agent.recipe.programs import Problem
from agent.recipe.setups import CODE_TOOL
from conversations.messages import ToolCall, given_messages
from conversations.trajectory import ToolCallRecord

RECOVERY_SEED = 500_000
"""The generated problems of recovery tasks are drawn from here on; the others from 0 on."""


def generated_tasks(count: int) -> list[Task]:
    """The first `count` problems of reasoning-gym's gsm_symbolic."""
    rows = symbolic.drawn(count, min(symbolic.HELD_OUT_SEEDS))
    return [
        _task(f"gsm_symbolic-{index}", row["question"], whole_number(row["answer"]))
        for index, row in enumerate(rows)
    ]


def gsm8k_tasks(path: Path, count: int) -> list[Task]:
    """The first `count` rows of a GSM8K-format file that are never trained on.

    Raises TaskError for a row of another form.
    """
    rows = [(index, row) for index, row in enumerate(read_gsm8k(path)) if held_out(row["question"])]
    return [
        _task(f"gsm8k-{index}", row["question"], _final(row["answer"]))
        for index, row in rows[:count]
    ]


def _final(answer: str) -> str:
    return answer.rpartition("####")[2].strip().replace(",", "")


async def recovery_tasks(dispatcher: Dispatcher, count: int) -> list[Task]:
    """`count` generated problems, each with a first call already made, whose program failed in the
    tools' own sandbox.
    """
    tasks: list[Task] = []
    for problem, broken in _broken_problems(count):
        call = ToolCall(name=CODE_TOOL, arguments={"code": broken}, raw="")
        line = await _run(dispatcher, call)
        if line.status == "tool_error" and len(tasks) < count:
            given = [
                {"role": "user", "content": problem.question},
                *_exchange(call, line.response or ""),
            ]
            tasks.append(
                Task(
                    f"recovery-{len(tasks)}",
                    given_messages(given),
                    ground_truth=whole_number(problem.answer),
                )
            )
    return tasks


def _broken_problems(count: int) -> Iterator[tuple[Problem, str]]:
    """Problems with a program that fails; a few more than `count`, as not every program can be
    broken.
    """
    rng = Random(RECOVERY_SEED)
    for problem in symbolic.problems(count + 8, RECOVERY_SEED):
        if found := broken_code(problem.code, rng):
            yield problem, found[0]


async def _run(dispatcher: Dispatcher, call: ToolCall) -> ToolCallRecord:
    """What the runtime's ledger says of a call, its text for the model included."""
    tools = ConversationTools(dispatcher, {}, None)
    turn = PendingTurn(0, [call])
    try:
        await tools.create()
        await tools.run(turn)
    finally:
        await tools.release()
    return turn.lines()[0]


def _exchange(call: ToolCall, response: str) -> list[dict[str, Any]]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    made = {"id": "call_given", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": response, "tool_call_id": "call_given"},
    ]


def _task(name: str, question: str, answer: str) -> Task:
    return Task(name, given_messages([{"role": "user", "content": question}]), ground_truth=answer)


def question(task: Task) -> str:
    """What a task asks, word for word."""
    return str(next(message["content"] for message in task.messages if message["role"] == "user"))


def trained_on(tasks: Sequence[Task], generated: int) -> set[str]:
    """Ids of the tasks whose question stands, word for word, among the `generated` problems of a
    training mix.
    """
    rows = symbolic.drawn(generated, symbolic.FIRST_TRAINING_SEED)
    asked = {row["question"] for row in rows}
    return {task.id for task in tasks if question(task) in asked}
