"""Engines without a model, which play token ids back: for tests, benchmarks and recorded runs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agent.engines.engine import Generation, SamplingParams
from agent.errors import EndConversation, EngineError
from conversations.trajectory import Trajectory, Turn

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
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        """The scripted answer, cut to `max_new_tokens` as a real engine cuts it."""
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


class Playback:
    """The model of one recorded trajectory: it samples the recorded turns again, from turn `first`
    on.

    Each turn comes back with everything that the record has on it. After the last turn the
    conversation ends as the recorded one did. It ends as `cancelled` if the tokens before a turn
    differ from the recorded ones, or if the turn does not fit into the budgets.
    """

    def __init__(self, trajectory: Trajectory, first: int = 0) -> None:
        self._record = trajectory
        self._ids = trajectory.prompt_ids + trajectory.response_ids
        self._next = first

    def describe(self) -> dict[str, Any]:
        """The record's `engine` field: the engine that sampled the tokens."""
        return self._record.engine

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        """The recorded turn. Raises EndConversation, or the recorded EngineError."""
        await asyncio.sleep(0)
        if self._next >= len(self._record.turns):
            raise self._end()
        turn = self._record.turns[self._next]
        if (at := first_difference(prompt_ids, self._ids[: turn.start])) is not None:
            raise EndConversation(
                "cancelled",
                f"replay: turn {self._next} was sampled after other tokens, "
                f"the first of them token {at}",
            )
        if turn.end - turn.start > sampling["max_new_tokens"]:
            raise EndConversation(
                "cancelled",
                f"replay: turn {self._next} has {turn.end - turn.start} tokens, "
                f"the budgets leave {sampling['max_new_tokens']}",
            )
        self._next += 1
        if turn.finish_reason == "abort":
            raise EndConversation(
                self._record.stop_reason, self._record.error, self._generation(turn)
            )
        return self._generation(turn)

    def _generation(self, turn: Turn) -> Generation:
        shift = len(self._record.prompt_ids)
        # All of them are floats: these tokens were sampled.
        logprobs: Any = self._record.response_logprobs[turn.start - shift : turn.end - shift]
        more = {
            field.name: getattr(turn, field.name)
            for field in dataclasses.fields(Generation)
            if hasattr(turn, field.name)
        }
        return Generation(self._ids[turn.start : turn.end], logprobs, **more)

    def _end(self) -> Exception:
        record = self._record
        if record.stop_reason == "engine_error":
            return EngineError(record.error)
        if record.stop_reason in ("cancelled", "deadline"):
            return EndConversation(record.stop_reason, record.error)
        return EndConversation(
            "cancelled", f"replay: the recorded conversation ended here with {record.stop_reason}"
        )

    async def abort(self, request_id: str) -> None:
        """Nothing runs that could be aborted."""

    async def close(self) -> None:
        """Nothing is held."""


def first_difference(first: Sequence[Any], second: Sequence[Any]) -> int | None:
    """The first index at which two sequences differ; None if they are equal.

    If one is the beginning of the other, it is the shorter one's length.
    """
    if first == second:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
