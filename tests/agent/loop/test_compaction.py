"""A long conversation goes on from its model's summary: a branch, with everything else the same."""

from __future__ import annotations

from typing import Any

import pytest

from agent.loop.compaction import HEAD, REQUEST, ContextSettings
from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.replay.playback import played_back
from conversations.branches import Totals, rows
from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from conversations.trajectory import Trajectory
from tests.helpers import QUESTION, Toy, call, hermes_template, run_one, runtime, says, task


@pytest.fixture(scope="module")
def hermes() -> ChatTemplate:
    return hermes_template()


LOOK = call("toy", do="say", text="word " * 60)
DONE = "It is 42."


def defects(record: Trajectory, template: ChatTemplate, **facts: Any) -> list[str]:
    known = RunFacts(template=template, response_length=4096, max_model_len=8192, **facts)
    line = f"{record.to_line()}\n".encode()
    return [finding.what for finding in check_line(line, known).findings]


def compacting(template: ChatTemplate, *turns: str, keep: int = 0, **limits: Any) -> Any:
    return runtime(
        template, says(template, *turns), [Toy()],
        context=ContextSettings(compact_at=limits.pop("compact_at", 500), keep=keep), **limits,
    )  # fmt: skip


async def test_the_summary_begins_a_branch(hermes: ChatTemplate) -> None:
    shared = compacting(hermes, LOOK, LOOK, "I looked twice.", LOOK, DONE)
    record = await run_one(shared)
    (branch,) = record.branches
    assert (record.stop_reason, branch.parent, branch.reason) == ("stop", None, "new")
    assert record.messages[-2:] == [
        {"role": "user", "content": REQUEST},
        {"role": "assistant", "content": "I looked twice.", "raw": "I looked twice."},
    ]
    asked = branch.messages[0]["content"]
    assert asked == f"{QUESTION[0]['content']}\n\n{HEAD}\n\nI looked twice."
    assert [kind for kind, _, _ in record.segments][-4:] == [TOOL, USER, "template", "sampled"]
    assert [line.status for line in branch.tool_calls] == ["ok"]
    assert Totals.of(record).turns == 5
    assert sum(sum(row.trajectory.response_mask) for row in rows(record)) == (
        Totals.of(record).sampled_tokens
    )
    assert defects(record, hermes) == []


async def test_the_last_turns_are_kept_word_for_word(hermes: ChatTemplate) -> None:
    shared = compacting(hermes, LOOK, LOOK, "Twice.", DONE, keep=1, compact_at=520)
    record = await run_one(shared)
    kept = record.branches[0].messages[1:-1]
    assert [message["role"] for message in kept] == ["assistant", "tool"]
    assert kept[0]["raw"] is None
    assert kept[0]["tool_calls"][0]["id"] == kept[1]["tool_call_id"] == "kept_call_1_0"
    assert defects(record, hermes) == []


async def test_budgets_and_turns_are_the_conversations(hermes: ChatTemplate) -> None:
    endless = [LOOK, LOOK, "Once."] * 9
    record = await run_one(compacting(hermes, *endless, max_turns=8))
    assert (record.stop_reason, Totals.of(record).turns) == ("max_turns", 8)
    assert len(record.branches) == 2
    assert defects(record, hermes, max_turns=8) == []
    short = await run_one(compacting(hermes, *endless, response_length=1200))
    assert short.stop_reason == "length"
    spent = [short, *short.branches]
    assert sum(len(one.response_ids) for one in spent) <= 1200
    assert defects(short, hermes) == []


async def test_calls_in_a_summary_are_not_run(hermes: ChatTemplate) -> None:
    record = await run_one(compacting(hermes, LOOK, LOOK, "Sum." + LOOK, DONE))
    assert [line.status for line in record.tool_calls] == ["ok", "ok", "rejected"]
    assert defects(record, hermes) == []


async def test_a_summary_that_leaves_no_room_ends_with_length(hermes: ChatTemplate) -> None:
    record = await run_one(compacting(hermes, LOOK, LOOK, "long " * 400))
    assert (record.stop_reason, record.branches) == ("length", [])


@pytest.mark.parametrize("turns", [(LOOK, LOOK, "Sum.", LOOK, DONE), (LOOK, LOOK, "Sum.", DONE)])
async def test_it_is_played_back_token_for_token(
    hermes: ChatTemplate, turns: tuple[str, ...]
) -> None:
    shared = compacting(hermes, *turns)
    record = await run_one(shared)
    conversation = Conversation(task(), 0, played_back(shared, record))
    await converse(conversation)
    again = trajectory_of(conversation)
    for one, two in zip([record, *record.branches], [again, *again.branches], strict=True):
        assert (one.prompt_ids, one.response_ids) == (two.prompt_ids, two.response_ids)
        assert one.messages == two.messages
    assert again.stop_reason == record.stop_reason
