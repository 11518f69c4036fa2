"""The engine protocol: token ids in, token ids and log-probs out. An engine never sees text.

Invariant: `generate` returns exactly what was sampled. An engine that cannot do so raises
`EngineError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agent.engines.evidence import Evidence
from agent.errors import EndConversation
from conversations.images.placing import PlacedImage

SamplingParams = Mapping[str, Any]
"""SGLang's own names: temperature, top_p, top_k, min_p, max_new_tokens, stop_token_ids, ignore_eos,
...
"""


@dataclass(frozen=True, slots=True)
class Generation:
    """One assistant turn as the engine sampled it.

    `token_ids` [T] and `logprobs` [T] belong together, the end token included if it was sampled;
    log-probs are those of the temperature-scaled distribution, as returned.
    `finish_reason` is the engine's: "stop", "length" or "abort".
    `prompt_tokens` and `cached_tokens` count tokens, times are seconds; None if the engine does not
    report them. `resumed` is the record's (see `Turn`), of a turn played back. `evidence` is what
    was asked for beside that.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    queue_s: float | None = None
    engine_s: float | None = None
    weight_version: str | None = None
    resumed: list[list[Any]] | None = None
    evidence: Evidence | None = None


class Interrupted(asyncio.CancelledError):
    """A generation that was cancelled after some tokens: `generation`, its finish reason "abort".

    Code that catches it must raise a plain CancelledError: `asyncio.timeout` knows no other.
    """

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self.generation = generation


class EndedGeneration(EndConversation):
    """A conversation that an engine ends within a turn.

    `generation` is what it sampled of the turn, its finish reason "abort"; None if that is nothing.
    """

    def __init__(self, reason: str, error: str | None, generation: Generation | None) -> None:
        super().__init__(reason, error)
        self.generation = generation


class Engine(Protocol):
    """All that a conversation asks of an engine.

    An engine may also have `tokens_in_flight() -> int`: the tokens sampled so far by turns that are
    not complete, for a line of progress. Any thread may call it. It may have `image_problem() ->
    str`, why it cannot be given images, empty if it can; without it, it takes them.
    One that gives evidence also takes `evidence: EvidenceRequest | None = None` in `generate`.
    """

    def describe(self) -> dict[str, Any]:
        """Name, model and versions, for the record's `engine` field. JSON values only."""
        ...

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """Samples one turn after `prompt_ids`.

        `images` are those whose tokens lie in `prompt_ids`, in order; the keyword is given only if
        there are any.

        `prompt_ids` is the conversation's own live sequence: read it before the first await, never
        keep it. `request_id` is 32 hex digits, used once. If cancelled, aborts the
        request in the engine and raises `CancelledError`: `Interrupted`, with the tokens sampled so
        far, if the engine reports them in time. Raises `EngineError` if the engine failed.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Stops a running or queued request; an unknown id is ignored."""
        ...

    async def close(self) -> None:
        """Frees the engine. Safe to call twice."""
        ...
