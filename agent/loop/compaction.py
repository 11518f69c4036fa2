"""A long conversation goes on from a summary that its model writes.

If the next prompt would reach `compact_at` tokens, a user message asks for a summary behind the
tools' responses. The model's answer ends the sequence: it is sampled, and trained. The next one
begins with the task's messages and the summary, and is a branch of the record, with reason `new`.
Deadline, budgets, tools and rewards are those of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversations.messages import Message
from conversations.rounds import sampled_places
from conversations.tokens import TokenSequence
from conversations.trajectory import Branch, ToolCallRecord, Turn

REQUEST = (
    "The conversation is about to leave its context. Write a summary from which you can go on: the "
    "task, what was done and found so far, what is left to do. Call no tool."
)
HEAD = "Summary of the work so far, written by you:"
NO_CALLS = "the turn was asked for a summary, so its calls were not run"


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """When a conversation is compacted: before a prompt of `compact_at` tokens.

    The last `keep` turns, with their answers, stand word for word behind the summary.
    """

    compact_at: int
    keep: int = 0


def summary_request() -> Message:
    """The user message that asks for a summary."""
    return {"role": "user", "content": REQUEST}


def after_summary(task: Sequence[Message], messages: Sequence[Message], keep: int) -> list[Message]:
    """The messages of the next sequence. `messages` are the last one's, its summary the last.

    The summary stands in the task's last message, if that is a user's: some templates refuse two.
    """
    summary = f"{HEAD}\n\n{str(messages[-1]['content']).strip()}"
    kept = _kept(messages, keep)
    last = task[-1]
    if last["role"] == "user" and isinstance(last["content"], str):
        return [*task[:-1], {**last, "content": f"{last['content']}\n\n{summary}"}, *kept]
    return [*task, {"role": "user", "content": summary}, *kept]


def _kept(messages: Sequence[Message], keep: int) -> list[Message]:
    """The last `keep` answered turns, given now; the request and the summary are not among them."""
    places = sampled_places(messages)[:-1]
    if not keep or not places:
        return []
    return [_given(message) for message in messages[places[-keep:][0] : -2]]


def _given(message: Message) -> Message:
    """A kept message: its call ids are told from those of the turns to come."""
    given = dict(message)
    if "raw" in given:
        given["raw"] = None
    if "tool_call_id" in given:
        given["tool_call_id"] = f"kept_{given['tool_call_id']}"
    if "tool_calls" in given:
        given["tool_calls"] = [{**call, "id": f"kept_{call['id']}"} for call in given["tool_calls"]]
    return given


def sequence_of(
    tokens: TokenSequence,
    turns: list[Turn],
    messages: list[Message],
    calls: list[ToolCallRecord],
    tools: list[dict[str, Any]],
    images: list[dict[str, Any]],
) -> Branch:
    """A sequence of the conversation as the record has it."""
    return Branch(
        parent=None,
        reason="new",
        client={},
        **tokens.columns(),
        turns=turns,
        messages=messages,
        tool_calls=calls,
        tools=tools,
        images=images,
    )
