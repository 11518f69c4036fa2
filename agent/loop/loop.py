"""One conversation, from its first prompt to its stop reason: generate, call, append, repeat.

Invariant: whatever goes wrong ends in the record, with one stop reason, the first that happened.
"""

from __future__ import annotations

import asyncio

from agent.errors import EndConversation, EngineError
from agent.loop.boundary import describe, time_left
from agent.loop.conversation import Conversation
from conversations.errors import ImageError, TemplateError


async def converse(conversation: Conversation) -> None:
    """Runs a conversation to its end; `trajectory_of` is its record then.

    Raises only CancelledError: the record is complete up to the last finished turn, with
    `cancelled`. Rewards and releases have what is left of the deadline, at least a few seconds.
    """
    deadline = asyncio.timeout(conversation.deadline_s)
    ending = conversation.ending
    try:
        try:
            async with deadline:
                await _turns(conversation)
        except asyncio.CancelledError:
            ending.stop("cancelled")
            raise
        except EndConversation as end:
            ending.stop(end.reason, end.error)
        except EngineError as error:
            ending.fail(str(error), "engine_error")
        except (
            ImageError,
            TemplateError,
        ) as error:  # the messages are at fault: trying again cannot help
            ending.stop("engine_error", str(error))
        except Exception as error:
            if deadline.expired():
                ending.stop("deadline")
            else:  # a bug of ours: kept in the record like every other failure
                ending.fail(describe(error), "engine_error")
        await conversation.collect_rewards(time_left(deadline))
    finally:
        await conversation.close(time_left(deadline))


async def _turns(conversation: Conversation) -> None:
    if not await conversation.open():
        conversation.ending.stop("prompt_too_long")
        return
    while await _sample(conversation) and await _answer(conversation):
        pass


async def _sample(conversation: Conversation) -> bool:
    """Samples and appends a turn, unless one is pending; False if the conversation has stopped."""
    if conversation.pending is not None:
        return True
    # 1. Budget: what this turn may sample.
    room = conversation.room()
    if room <= 0:
        conversation.ending.stop("length")
        return False
    # 2. Generate, and append what was sampled.
    conversation.append_turn(await conversation.generate(room))
    return True


async def _answer(conversation: Conversation) -> bool:
    """Answers the pending turn and appends the answer; False if the conversation has stopped."""
    turn = conversation.pending
    if turn is None:
        return False
    # 3. A turn that was cut has its calls never run; one without calls is the user's to answer.
    if not turn.is_complete:
        conversation.reject_calls(turn)
        return False
    # A summary ends its sequence; the conversation goes on from it.
    if conversation.summing_up:
        return conversation.compact(turn)
    if not turn.calls:
        reason = await conversation.take_user_turn()
    else:
        # 4. Run the calls.
        lines = await conversation.run_calls(turn)
        reason = conversation.reason_to_stop(lines)
        # 5. Append their responses, if they fit.
        if not reason and not conversation.append_responses(lines):
            reason = "length"
    if reason:
        conversation.ending.stop(reason)
    return not reason
