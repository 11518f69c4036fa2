"""The protocol and the recovery are counted from the record alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from agent.recipe.metrics import Ratio, complete, outcome_of, scores
from conversations.trajectory import ToolCallRecord, Trajectory

CODE = ToolCallRecord("call_0_0", 0, "code_interpreter", {"code": "print(1)"}, status="ok")
ANSWER = ToolCallRecord("call_1_0", 1, "calculate_answer", {"answer": "1"}, status="ok")
SAID = {"role": "assistant", "content": "The answer is 1.", "raw": "The answer is 1."}


def record(
    calls: list[ToolCallRecord], last: dict[str, Any] | None = None, **changes: Any
) -> Trajectory:
    messages = [{"role": "user", "content": "q"}, *changes.pop("given", []), last or SAID]
    lists: dict[str, Any] = {
        name: []
        for name in (
            "prompt_ids",
            "response_ids",
            "response_mask",
            "response_logprobs",
            "segments",
            "turns",
        )
    }
    trajectory = Trajectory(
    id="t-0", task_id="t", sample=0, messages=messages, tool_calls=calls, tools=[],
    stop_reason="stop", num_turns=3, infra_error=False, error=None, warnings=[], reward=1.0,
    reward_parts={}, ground_truth="1", data_source=None, extra=None, engine={}, sampling={},
    parent=None, started_at="", wall_s=0.0, **lists,
    )  # fmt: skip
    return dataclasses.replace(trajectory, **changes)


def failing(code: str) -> list[dict[str, Any]]:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "code_interpreter", "arguments": json.dumps({"code": code})},
    }
    return [
        {"role": "assistant", "content": "", "tool_calls": [call], "raw": None},
        {"role": "tool", "content": "NameError"},
    ]


def test_code_then_answer_then_a_sentence_is_complete() -> None:
    assert complete(record([CODE, ANSWER]))


@pytest.mark.parametrize(
    "trajectory",
    [
        record([ANSWER, CODE]),
        record([ANSWER]),
        record([CODE]),
        record([dataclasses.replace(CODE, status="tool_error"), ANSWER]),
        record([CODE, dataclasses.replace(ANSWER, status="invalid_arguments")]),
        record([CODE, ANSWER], stop_reason="length"),
        record([CODE, ANSWER], last={"role": "assistant", "content": " ", "raw": " "}),
        record([CODE, ANSWER], last={"role": "tool", "content": "1"}, stop_reason="max_turns"),
    ],
)
def test_anything_else_is_not(trajectory: Trajectory) -> None:
    assert not complete(trajectory)


def test_calls_of_the_wrong_shape_are_not_valid_failing_programs_are() -> None:
    statuses = ["ok", "tool_error", "malformed", "unknown_tool", "invalid_arguments", "timeout"]
    one = outcome_of(record([dataclasses.replace(CODE, status=status) for status in statuses]))
    assert (one.calls, one.valid_calls) == (6, 3)


def test_recovery_asks_for_other_code_that_runs_and_the_whole_protocol() -> None:
    assert outcome_of(record([CODE, ANSWER])).recovered is None
    assert outcome_of(record([CODE, ANSWER], given=failing("print(x)"))).recovered is True
    assert outcome_of(record([CODE, ANSWER], given=failing("print(1)"))).recovered is False
    assert outcome_of(record([CODE], given=failing("print(x)"))).recovered is False
    failed = dataclasses.replace(CODE, arguments={"code": "print(y)"}, status="tool_error")
    assert outcome_of(record([failed, CODE, ANSWER], given=failing("print(x)"))).recovered is False


def test_scores_count_conversations_and_leave_out_what_the_infrastructure_failed() -> None:
    broken = record([], infra_error=True, reward=None)
    found = scores([record([CODE, ANSWER]), record([CODE], reward=0.0), broken])
    assert (found.complete, found.right, found.valid_calls) == (
        Ratio(1, 2),
        Ratio(1, 2),
        Ratio(3, 3),
    )
    assert scores([broken]).right == Ratio(0, 0)
    assert Ratio(0, 0).value is None
    assert scores(
        [record([CODE, ANSWER], given=failing("print(x)")), record([CODE, ANSWER])]
    ).recovered == Ratio(1, 1)
