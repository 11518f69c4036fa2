"""A turn in the record and the generation that it came from: one made of the other."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from agent.engines.engine import Generation
from agent.errors import EngineError
from conversations.trajectory import Turn


def turn_of(start: int, generation: Generation) -> Turn:
    """The record's turn of a generation whose first token has the index `start`."""
    return Turn(
        start=start,
        end=start + len(generation.token_ids),
        finish_reason=generation.finish_reason,
        prompt_tokens=start,
        cached_tokens=generation.cached_tokens,
        queue_s=generation.queue_s,
        engine_s=generation.engine_s,
        weight_version=generation.weight_version,
        resumed=generation.resumed,
    )


def generation_of(turn: Turn, token_ids: list[int], logprobs: list[float]) -> Generation:
    """The generation that `turn_of` made a turn of."""
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=turn.finish_reason,
        prompt_tokens=turn.prompt_tokens,
        cached_tokens=turn.cached_tokens,
        queue_s=turn.queue_s,
        engine_s=turn.engine_s,
        weight_version=turn.weight_version,
        resumed=turn.resumed,
    )


def joined(begun: Turn, rest: Turn) -> Turn:
    """One turn of the two parts of an interrupted one."""
    return replace(
        rest,
        start=begun.start,
        prompt_tokens=begun.prompt_tokens,
        cached_tokens=begun.cached_tokens,
        queue_s=_sum(begun.queue_s, rest.queue_s),
        engine_s=_sum(begun.engine_s, rest.engine_s),
        weight_version=begun.weight_version,
        resumed=[*(begun.resumed or []), [begun.end, rest.weight_version]],
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def check_generation(
    generation: Generation, start: int, room: int, reasons: Collection[str]
) -> None:
    """Raises EngineError if an engine's answer is not data.

    It is data if the engine saw our `start` tokens, ended for one of `reasons`, and returned 1 to
    `room` ids, each with a log-prob that is a finite number.
    """
    ids, logprobs = generation.token_ids, generation.logprobs
    if generation.prompt_tokens not in (None, start):
        raise EngineError(
            f"the engine saw {generation.prompt_tokens} prompt tokens, but {start} were sent"
        )
    if generation.finish_reason not in reasons:
        raise EngineError(f"the engine ended the generation with {generation.finish_reason!r}")
    if not ids or len(ids) > room:
        raise EngineError(f"the engine returned {len(ids)} tokens, but 1 to {room} were asked for")
    if len(ids) != len(logprobs):
        raise EngineError(f"the engine returned {len(ids)} tokens with {len(logprobs)} log-probs")
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("the engine returned a log-prob that is not a finite number")
