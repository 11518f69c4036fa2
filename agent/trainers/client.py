"""The inference servers of a verl 0.8 or 0.9 trainer, behind the client that its agent loops are
given.

Invariant: one engine serves one conversation. All of its turns go to verl under one request id, by
which verl's balancer keeps a conversation on the server that has its prefix in the cache.

verl's client cannot abort one request: if a turn is cancelled (by a deadline, say) the server keeps
sampling up to the turn's budget, and the result is dropped. Requests that the trainer aborts itself
(for new weights) come back as `aborted`; the client of its asynchronous modes continues them under
the new weights, and the conversation does not notice.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from agent.engines.engine import EndedGeneration, Generation, SamplingParams
from agent.errors import EngineError
from agent.loop.boundary import describe
from conversations.images.placing import PlacedImage

ABORTED = ("abort", "aborted")
SUMMED = ("spec_num_draft_tokens", "spec_num_accepted_tokens", "spec_num_verify_steps")
"""verl's counters of speculative decoding, summed up for its metrics."""


class VerlClientEngine:
    """One conversation's engine. `client` is verl's `LLMServerClient`, or anything with its
    `generate`.

    `drifts(ids, images)` says whether verl's server would see other ids than these: beside images
    SGLang, as verl calls it, decodes and encodes them again. Such a turn is refused. `generate_s`
    is the time spent in the servers. `num_preempted` is None if they do not report it.
    `fields` is what verl's trainers read of a conversation: the first and last weights' step and
    the counters of speculative decoding.
    """

    def __init__(
        self,
        client: Any,
        description: dict[str, Any],
        request_id: str | None = None,
        drifts: Callable[[Sequence[int], Sequence[PlacedImage]], bool] | None = None,
    ) -> None:
        self._drifts = drifts
        self._client = client
        self._description = description
        self._request_id = request_id or uuid.uuid4().hex
        self.generate_s = 0.0
        self.num_preempted: int | None = None
        self.fields: dict[str, Any] = {"min_global_steps": None, "max_global_steps": None}

    def describe(self) -> dict[str, Any]:
        """The record's `engine` field."""
        return self._description

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """Samples one turn.

        Raises EngineError if verl's servers failed, EndedGeneration if the trainer aborted the
        turn.
        """
        limit = sampling["max_new_tokens"]
        params = {key: value for key, value in sampling.items() if key != "max_new_tokens"}
        # `max_tokens` is the name that all of verl's servers know.
        params |= {"max_tokens": limit, "logprobs": True}
        prompt = {"prompt_ids": list(prompt_ids)}
        started = perf_counter()
        try:
            if images:
                if self._drifts and self._drifts(prompt_ids, images):
                    raise EngineError(
                        "verl's SGLang server would encode this prompt anew beside its images, and "
                        "not to the same ids; rollout.name: vllm keeps them"
                    )
                pictures = [image.picture for image in images]
                seen = await asyncio.to_thread(lambda: [one.image() for one in pictures])
                prompt["image_data"] = seen
            output = await self._client.generate(self._request_id, **prompt, sampling_params=params)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"verl's server failed: {_one_line(error)}") from error
        finally:
            self.generate_s += perf_counter() - started
        self._note(output)
        generation = _generation(output, limit, sampling["stop_token_ids"])
        if generation.finish_reason == "abort":
            partial = generation if generation.token_ids else None
            raise EndedGeneration("cancelled", "the trainer aborted the request", partial)
        return generation

    async def abort(self, request_id: str) -> None:
        """Does nothing: verl's client cannot abort one request."""

    async def close(self) -> None:
        """Does nothing: the servers are the trainer's."""

    def _note(self, output: Any) -> None:
        if output.num_preempted is not None:
            self.num_preempted = (self.num_preempted or 0) + output.num_preempted
        reported, fields = output.extra_fields, self.fields
        first, last = _steps(reported)
        if fields["min_global_steps"] is None:
            fields["min_global_steps"] = first
        if last is not None:
            fields["max_global_steps"] = last
        for key in SUMMED:
            if key in reported:
                fields[key] = fields.get(key, 0) + int(reported[key])


def _one_line(error: Exception) -> str:
    """What failed.

    Ray's errors carry the original one as `cause`; their text is its whole traceback.
    """
    cause = getattr(error, "cause", None)
    return " ".join(describe(cause if isinstance(cause, Exception) else error).split())


def _steps(reported: Mapping[str, Any]) -> list[int | None]:
    """The first and the last weights' step of a turn; None if the server does not report them."""
    return [
        reported.get(key, reported.get("global_steps"))
        for key in ("min_global_steps", "max_global_steps")
    ]


def _weight_version(reported: Mapping[str, Any]) -> str | None:
    """The weights' step; `FIRST-LAST` if new weights came during the turn.

    verl's client does not say at which token they came.
    """
    return (
        "-".join(dict.fromkeys(str(step) for step in _steps(reported) if step is not None)) or None
    )


def _generation(output: Any, limit: int, stop_token_ids: Sequence[int]) -> Generation:
    """Reads verl's `TokenOutput`.

    vLLM reports `completed` both for a turn that ended and for one that was cut; TensorRT-LLM knows
    no limit of a turn.
    """
    ids, logprobs = list(output.token_ids)[:limit], list(output.log_probs or [])[:limit]
    ended = output.stop_reason == "stop" or (bool(ids) and ids[-1] in stop_token_ids)
    if output.stop_reason in ABORTED:
        reason = "abort"
    else:
        reason = "stop" if ended and len(output.token_ids) <= limit else "length"
    return Generation(
        ids,
        logprobs,
        reason,
        cached_tokens=output.extra_fields.get("num_cached_tokens"),
        weight_version=_weight_version(output.extra_fields),
    )
