"""Engines without a model, which play token ids back: for tests, benchmarks and recorded runs."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agent.engines.engine import Generation, SamplingParams
from agent.errors import EngineError
from conversations.images.placing import PlacedImage
from conversations.trajectory import Trajectory

Respond = Callable[[Sequence[int], SamplingParams], Generation]
"""Makes the answer to a prompt; may raise EngineError."""


class ScriptedEngine:
    """Answers each prompt with what `respond` returns, after `delay_s` seconds."""

    def __init__(self, respond: Respond, *, delay_s: float = 0.0) -> None:
        self._respond = respond
        self._delay_s = delay_s

    def describe(self) -> dict[str, Any]:
        """The record's `engine` field."""
        return {"name": "scripted"}

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """The scripted answer, cut to `max_new_tokens` as a real engine cuts it.

        It has no eyes: of `images` it only checks that each lies in the prompt.
        """
        if any(not 0 <= image.start < image.end <= len(prompt_ids) for image in images):
            raise EngineError("an image lies outside of the prompt")
        await asyncio.sleep(self._delay_s)
        generation = self._respond(prompt_ids, sampling)
        limit = sampling.get("max_new_tokens", len(generation.token_ids))
        if len(generation.token_ids) <= limit:
            return generation
        return Generation(generation.token_ids[:limit], generation.logprobs[:limit], "length")

    async def abort(self, request_id: str) -> None:
        """Nothing runs that could be aborted."""

    async def close(self) -> None:
        """Nothing is held."""


def recorded(trajectories: Iterable[Trajectory]) -> ScriptedEngine:
    """An engine that samples the recorded tokens: after a recorded prefix the turn that followed
    it.

    If several turns follow one prefix, they are handed out in order, round and round. `generate`
    raises EngineError for a prompt that no trajectory holds.
    """
    answers: dict[int, deque[Generation]] = defaultdict(deque)
    for trajectory in trajectories:
        ids = trajectory.prompt_ids + trajectory.response_ids
        first = len(trajectory.prompt_ids)
        for turn in trajectory.turns:
            logprobs = [
                value or 0.0
                for value in trajectory.response_logprobs[turn.start - first : turn.end - first]
            ]
            answers[hash(tuple(ids[: turn.start]))].append(
                Generation(ids[turn.start : turn.end], logprobs, turn.finish_reason)
            )

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        queue = answers.get(hash(tuple(prompt_ids)))
        if not queue:
            raise EngineError(f"no recorded turn follows these {len(prompt_ids)} tokens")
        queue.rotate(-1)
        return queue[-1]

    return ScriptedEngine(respond)
