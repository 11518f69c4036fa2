"""A conversation put back as a record has it.

Invariant: what is kept is the record's, token by token: the same ids, authors, log-probs, turns,
messages and ledger. To train on the fresh turns of a fork alone, mask `response_ids` before
`turns[parent["turn"]].start`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent.loop.calls import PendingTurn
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.runtime import Runtime
from agent.loop.tasks import recorded_task
from conversations.rounds import sampled_places
from conversations.tokens import SAMPLED, TokenSequence
from conversations.trajectory import Trajectory


def replayed(
    record: Trajectory,
    sample: int,
    runtime: Runtime,
    counterparts: Counterparts,
    *,
    kept: int | None,
    parent: dict[str, Any],
) -> Conversation:
    """`record` run again as sample `sample` of its task, its first `kept` turns as they are.

    With `kept` None not even the prompt is kept: it is rendered anew.
    """
    if kept is None:
        conversation = Conversation(recorded_task(record), sample, runtime, counterparts)
        conversation.known_images = _images_of_tools(record)
    else:
        conversation = restored(record, sample, runtime, counterparts, turns=kept)
    conversation.parent = parent
    return conversation


def restored(
    record: Trajectory, sample: int, runtime: Runtime, counterparts: Counterparts, *, turns: int
) -> Conversation:
    """The conversation of `record` after its first `turns` turns were answered, as sample `sample`.

    The given tools and user bring themselves into the state that they were in.
    """
    conversation = Conversation(recorded_task(record), sample, runtime, counterparts)
    _restore_tokens(conversation.tokens, record, turns)
    sampled = sampled_messages(record)
    ends = [*sampled, len(record.messages)]
    conversation.messages = record.messages[: ends[turns]]
    conversation.restored_images = [
        image for image in record.images if image["end"] <= len(conversation.tokens)
    ]
    conversation.known_images = _images_of_tools(record)
    conversation.turns = record.turns[:turns]
    conversation.settled_calls = [line for line in record.tool_calls if line.turn < turns]
    for line in conversation.settled_calls:
        conversation.count_invalid(line)
    for turn in range(turns):
        lines = [line for line in conversation.settled_calls if line.turn == turn]
        conversation.warn(record.messages[sampled[turn]], lines)
    return conversation


def restore_last_turn(conversation: Conversation, record: Trajectory) -> None:
    """Puts back the record's last turn, which nobody answered.

    It waits for its answer, or for its rest if it was interrupted and may go on.
    """
    turn = record.turns[-1]
    number = len(record.turns) - 1
    message = record.messages[sampled_messages(record)[-1]]
    start, end = turn.start - len(record.prompt_ids), turn.end - len(record.prompt_ids)
    ids = record.response_ids[start:end]
    logprobs: list[Any] = record.response_logprobs[start:end]
    parsed = conversation.runtime.template.read(
        message["raw"], conversation.schemas, after=conversation.messages[-1]
    )
    conversation.tokens.append_sampled(ids, logprobs)
    conversation.messages.append(message)
    has_end = ids[-1] in conversation.runtime.template.end_ids
    if turn.finish_reason == "abort":
        conversation.partial_turn = turn
        if not has_end and conversation.room() > 0:
            conversation.turns.append(turn)
            conversation.settled_calls += [
                line for line in record.tool_calls if line.turn == number
            ]
            return
        # It had reached its end, or that of its budget, when it was aborted.
        conversation.partial_turn = None
        turn = replace(turn, finish_reason="stop" if has_end else "length")
    conversation.turns.append(turn)
    is_complete = has_end or turn.finish_reason == "stop"
    conversation.pending = PendingTurn(number, parsed.calls, is_complete)


def _images_of_tools(record: Trajectory) -> list[str]:
    """The hashes of the images beside the task's own."""
    named = [image["sha256"] for image in record.images]
    named += [sha256 for line in record.tool_calls for sha256 in line.images]
    return list(dict.fromkeys(named))


def sampled_messages(record: Trajectory) -> list[int]:
    """The indices of the messages that the model sampled, one for each turn."""
    return sampled_places(record.messages)


def _restore_tokens(tokens: TokenSequence, record: Trajectory, turns: int) -> None:
    ids, shift = record.prompt_ids + record.response_ids, len(record.prompt_ids)
    end = record.turns[turns].start if turns < len(record.turns) else len(ids)
    for kind, start, stop in record.segments:
        part = ids[start : min(stop, end)]
        if kind == SAMPLED and part:
            first = start - shift
            logprobs: list[Any] = record.response_logprobs[first : first + len(part)]
            tokens.append_sampled(part, logprobs)
        else:
            tokens.append(kind, part)
