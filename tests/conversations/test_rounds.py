"""Whose message it is: the task's, a tool's at its creation, the model's."""

from __future__ import annotations

from typing import Any

import pytest

from conversations.export.verl_rl import given
from conversations.rounds import first_sampled, given_length, is_sampled, last_sampled, split_rounds

USER = {"role": "user", "content": "q"}
GIVEN = {"role": "assistant", "content": "", "raw": None}
RESULT = {"role": "tool", "content": "given by the task", "name": "f"}
GREETING = {"role": "tool", "content": "said at creation", "name": "f"}
SAMPLED = {"role": "assistant", "content": "x", "raw": "x"}
TOOLS = [{"function": {"name": name}} for name in ("f", "g")]


def test_a_sampled_message_has_raw_text() -> None:
    assert [is_sampled(one) for one in (USER, GIVEN, RESULT, SAMPLED)] == [
        False,
        False,
        False,
        True,
    ]
    assert not is_sampled({"role": "user", "content": "x", "raw": "x"})
    messages = [USER, SAMPLED, RESULT, SAMPLED, RESULT]
    assert (first_sampled(messages), last_sampled(messages)) == (1, 3)
    assert (first_sampled([USER]), last_sampled([USER])) == (1, -1)
    assert [len(one.replies) for one in split_rounds(messages).rounds] == [1, 1]


@pytest.mark.parametrize(
    ("opening", "segments", "own"),
    [
        ([USER, GIVEN, RESULT], [["prompt", 0, 5]], 3),
        ([USER, GREETING], [["prompt", 0, 3], ["tool", 3, 5]], 1),
        ([USER, GIVEN, RESULT, GREETING], [["prompt", 0, 3], ["tool", 3, 5]], 3),
        ([USER, GREETING, {**GREETING, "name": "g"}], [["tool", 3, 5]], 1),
        ([USER, {**GREETING, "name": "g"}, GREETING], [["tool", 3, 5]], 2),
        ([USER, {**RESULT, "tool_call_id": "c"}], [["tool", 3, 5]], 2),
        ([USER, {**RESULT, "name": "other"}], [["tool", 3, 5]], 2),
        ([USER, GREETING], [["prompt", 0, 5], ["tool", 7, 9]], 2),
    ],
)
def test_a_tasks_own_trailing_tool_message_is_kept(
    opening: list[dict[str, Any]], segments: list[list[Any]], own: int
) -> None:
    messages = [*opening, SAMPLED]
    assert given_length(messages, TOOLS, segments, 5) == own
    record = {"messages": messages, "tools": TOOLS, "segments": segments, "prompt_ids": [0] * 5}
    assert given(record) == opening[:own]
