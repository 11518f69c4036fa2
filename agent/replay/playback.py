"""The model of one recorded trajectory: it samples what was sampled, if it sees what was seen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from agent.engines.engine import EndedGeneration, Generation, SamplingParams
from agent.errors import EndConversation, EngineError
from agent.loop.runtime import Runtime
from agent.loop.turns import generation_of
from agent.replay.compare import index_of_difference
from conversations.branches import first_turn, is_aside, path_of
from conversations.images.placing import PlacedImage
from conversations.trajectory import Trajectory, Turn


def played_back(runtime: Runtime, record: Trajectory, first: int = 0) -> Runtime:
    """The runtime with `record` as its model from turn `first` on.

    It has the record's sampling params and no deadline.
    """
    sampling = {key: value for key, value in record.sampling.items() if key != "stop_token_ids"}
    settings = replace(runtime.settings, deadline_s=None, sampling=sampling, evidence=None)
    return replace(runtime, engine=Playback(record, first), settings=settings)


class Playback:
    """An engine that returns the recorded turns from turn `first` on, with all that is recorded.

    The sequences of a compacted conversation follow each other. If the record has no next turn, the
    conversation ends as the recorded one did. If the tokens before a turn are others, or the turn
    does not fit its budget, it ends with `cancelled`.
    """

    def __init__(self, trajectory: Trajectory, first: int = 0) -> None:
        self._record = trajectory
        self._turns = list(_turns(trajectory, asides=False))
        self._asked = list(_turns(trajectory, asides=True))
        self._next = first

    def describe(self) -> dict[str, Any]:
        """The engine that sampled the tokens: nothing new is sampled, and no evidence given."""
        return {key: value for key, value in self._record.engine.items() if key != "evidence"}

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """The recorded turn. Raises EndConversation, or the recorded EngineError."""
        await asyncio.sleep(0)
        if (asked := self._asked_by_tool(prompt_ids)) is not None:
            return asked
        if self._next >= len(self._turns):
            raise self._end()
        number, (part, turn) = self._next, self._turns[self._next]
        ids = part.prompt_ids + part.response_ids
        at = index_of_difference(prompt_ids, ids[: turn.start])
        if at is not None:
            text = f"replay: turn {number} was sampled after other tokens, from token {at} on"
            raise EndConversation("cancelled", text)
        size, room = turn.end - turn.start, sampling["max_new_tokens"]
        if size > room:
            text = f"replay: turn {number} has {size} tokens, the budgets leave {room}"
            raise EndConversation("cancelled", text)
        self._next += 1
        generation = _generation(part, turn)
        if turn.finish_reason == "abort":
            raise EndedGeneration(self._record.stop_reason, self._record.error, generation)
        return generation

    def _asked_by_tool(self, prompt_ids: Sequence[int]) -> Generation | None:
        """The answer that a tool got to this prompt. Each is given once."""
        for place, (part, turn) in enumerate(self._asked):
            if list(prompt_ids) == (part.prompt_ids + part.response_ids)[: turn.start]:
                del self._asked[place]
                return _generation(part, turn)
        return None

    def _end(self) -> Exception:
        record = self._record
        if record.stop_reason == "engine_error" and record.infra_error:
            return EngineError(record.error)
        if record.stop_reason in ("cancelled", "deadline", "engine_error"):
            return EndConversation(record.stop_reason, record.error)
        text = f"replay: the recorded conversation ended here with {record.stop_reason}"
        return EndConversation("cancelled", text)

    async def abort(self, request_id: str) -> None:
        """Nothing runs that could be aborted."""

    async def close(self) -> None:
        """Nothing is held."""


def _turns(record: Trajectory, *, asides: bool) -> Iterator[tuple[Trajectory, Turn]]:
    """The turns of the conversation's sequences in order, or of its tools', with their path."""
    if not record.branches:
        yield from ((record, turn) for turn in record.turns if not asides)
        return
    for number in range(len(record.branches) + 1):
        if (number > 0 and is_aside(record.branches[number - 1])) != asides:
            continue
        path = path_of(record, number)
        yield from ((path, turn) for turn in path.turns[first_turn(record, number) :])


def _generation(part: Trajectory, turn: Turn) -> Generation:
    shift = len(part.prompt_ids)
    span = slice(turn.start - shift, turn.end - shift)
    logprobs: list[Any] = part.response_logprobs[span]  # floats: these tokens were sampled
    return generation_of(turn, part.response_ids[span], logprobs)
