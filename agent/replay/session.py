"""A recorded session again: its client's messages, behind the turns that its model samples now.

The client is the record: what it sent after each turn is sent again, whatever the turn says this
time, so a live model is compared turn by turn on the same requests. Sequences come in their
order, parents before branches.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

from agent.errors import EndConversation, EngineError
from agent.loop.batch import converse_observed
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.runtime import Runtime
from agent.loop.tasks import recorded_task
from agent.loop.turns import check_generation
from conversations.branches import first_turn, sequences
from conversations.errors import ImageError, TemplateError
from conversations.messages import Message
from conversations.rounds import is_sampled
from conversations.session import SessionTree, SessionTurn
from conversations.tokens import TokenSequence
from conversations.trajectory import Branch, Trajectory


class SessionReplay(Conversation):
    """The replay of a recorded session, as a conversation of a run."""

    __slots__ = ("recorded",)

    def __init__(self, record: Trajectory, sample: int, runtime: Runtime) -> None:
        super().__init__(recorded_task(record), sample, runtime, Counterparts(None, None))
        self.recorded = record


async def converse_again(conversation: Conversation) -> None:
    """Runs a conversation of a replay to its end, a session or not."""
    if not isinstance(conversation, SessionReplay):
        await converse_observed(conversation)
        return
    tree, ending = SessionTree(conversation.runtime.template), conversation.ending
    try:
        await _play(conversation, tree)
        ending.stop(conversation.recorded.stop_reason, conversation.recorded.error)
        ending.infra_error = conversation.recorded.infra_error
    except asyncio.CancelledError:
        ending.stop("cancelled")
        raise
    except EndConversation as end:
        ending.stop(end.reason, end.error)
    except EngineError as error:
        ending.fail(str(error), "engine_error")
    except (ImageError, TemplateError) as error:
        ending.stop("cancelled", f"replay: {error}")
    finally:
        _keep(conversation, tree)
        await conversation.close()


async def _play(conversation: SessionReplay, tree: SessionTree) -> None:
    """Sends the requests of all sequences. Raises what ends the replay."""
    record, runtime = conversation.recorded, conversation.runtime
    known = [image for part in sequences(record) for image in part.images]
    tree.image_sizes |= {one["sha256"]: (one["width"], one["height"]) for one in known}
    turns: dict[tuple[int, int], SessionTurn] = {}
    for number, part in enumerate(sequences(record)):
        above = record.branches[number - 1].parent if number else None
        before = turns[above["branch"], above["turn"] - 1] if above else None
        reason = record.branches[number - 1].reason if number else None
        place = first_turn(record, number)
        for given, recorded in zip(_given(part), part.turns, strict=False):
            request = tree.place_after(before, given, part.tools, reason=reason)
            ids = request.prompt_ids.to_list()
            room = _room(conversation, len(ids), recorded.end - recorded.start)
            more: dict[str, Any] = {}
            if images := request.prompt_images:
                placed = await runtime.image_reader().placed(images)
                conversation.pictures |= {one.picture.sha256: one.picture for one in placed}
                more["images"] = placed
            generation = await runtime.engine.generate(
                ids, _sampling(conversation, room), request_id=uuid.uuid4().hex, **more
            )
            check_generation(generation, len(ids), room, ("stop", "length"))
            before = turns[number, place] = tree.add(
                request,
                generation,
                response_id=recorded.response_id,
                asked=recorded.asked,
                client=part.client if isinstance(part, Branch) else None,
                notes=recorded.notes or (),
            )
            place, reason = place + 1, None


def _given(part: Trajectory | Branch) -> Iterator[list[Message]]:
    """What the client sent before each turn of a sequence."""
    sent: list[Message] = []
    for message in part.messages:
        if is_sampled(message):
            yield sent
            sent = []
        else:
            sent.append(message)


def _room(conversation: SessionReplay, prompt: int, recorded: int) -> int:
    """Tokens that a turn may sample. Raises EndConversation if there is no room."""
    settings = conversation.runtime.settings
    room = min(settings.max_model_len - prompt, settings.max_tokens or settings.response_length)
    if room <= 0:
        raise EndConversation("length", "replay: the request leaves no room for a turn")
    return max(room, min(recorded, settings.max_model_len - prompt))


def _sampling(conversation: SessionReplay, room: int) -> dict[str, object]:
    runtime = conversation.runtime
    return {
        **runtime.settings.sampling,
        "max_new_tokens": room,
        "stop_token_ids": runtime.template.stop_token_ids,
    }


def _keep(conversation: SessionReplay, tree: SessionTree) -> None:
    """The sequences so far as the conversation's own."""
    conversation.sequences = tree.branches()
    conversation.tokens, conversation.turns = TokenSequence(), []
    if not conversation.ending.is_failure and _is_recorded(conversation):
        conversation.rewards = dict(conversation.recorded.reward_parts)


def _is_recorded(conversation: SessionReplay) -> bool:
    """Whether all was sampled again as it was: then it is worth what it was worth."""
    known = [part.response_ids for part in sequences(conversation.recorded)]
    return known == [part.response_ids for part in conversation.sequences]
