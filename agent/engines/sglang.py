"""The in-process SGLang engine behind the engine protocol.

Invariants: all calls come from one event loop; a request id is in flight once; an answer of SGLang
is consistent (ids, log-probs, lengths) or it is an `EngineError`. A cancelled request is aborted in
SGLang, and its state there is kept until SGLang has answered: SGLang kills the process if it must
answer a request that it no longer knows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.engines.engine import Generation, Interrupted, SamplingParams
from agent.engines.evidence import EvidenceRequest, read_evidence
from agent.engines.pictures import OwnProcessor, is_native, native_fields
from agent.engines.processes import Children
from agent.engines.scoring import Scores, read_scores, score_request
from agent.engines.sticky import Conversations, asking_conversation, place_of
from agent.errors import EngineError
from conversations.images.placing import PlacedImage

REFUSED_SAMPLING = {
    "stop": "stop strings need a tokenizer in the engine; use stop_token_ids",
    "stop_regex": "stop patterns need a tokenizer in the engine; use stop_token_ids",
    "min_new_tokens": "min_new_tokens needs a tokenizer in the engine",
}
"""Each of these kills SGLang's scheduler if it runs without a tokenizer."""

Read = Callable[[Mapping[str, Any]], Generation]

ABORT_S = 2.0
"""Time limit for the tokens of an aborted request: a step of the model and the way back."""


class SGLangEngine:
    """`manager` is SGLang's TokenizerManager, `children` its processes, `description` what
    `describe` returns.
    """

    def __init__(
        self,
        manager: Any,
        children: Children,
        description: dict[str, Any],
        *,
        data_parallel_size: int = 1,
    ) -> None:
        self._manager = manager
        self._ranks = [Conversations() for _ in range(data_parallel_size)]
        self._children = children
        self._description = description
        self._vocab_size: int = manager.model_config.vocab_size
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}

    def describe(self) -> dict[str, Any]:
        """Name, model, device and versions."""
        return dict(self._description)

    def tokens_in_flight(self) -> int:
        """Tokens sampled so far by the turns that run, for a progress line. Any thread may call it.

        SGLang's scheduler sends them every 50 tokens of a turn, although nobody asked for a stream.
        """
        states = [self._manager.rid_to_state.get(request_id) for request_id in tuple(self._running)]
        return sum(len(state.output_ids) for state in states if state is not None)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        evidence: EvidenceRequest | None = None,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """Samples one turn.

        Raises EngineError as the protocol says, RuntimeError on a second event loop.
        """
        check_sampling(sampling)
        prompt = {"input_ids": list(prompt_ids)}
        if images:
            check_prompt(prompt["input_ids"], self._vocab_size)
            prompt = await self._with_images(prompt["input_ids"], images)
        fields = {
            **prompt,
            "sampling_params": dict(sampling),
            "return_logprob": True,
            "stream": False,
            **self._rank(),
            **(evidence.fields() if evidence else {}),
        }
        read = functools.partial(read_answer, asked=evidence)
        answer = await self._answer(fields, request_id, read)
        return Generation([], [], "abort") if answer is None else read(answer)

    def _rank(self) -> dict[str, int]:
        """Which of several data-parallel ranks has the running conversation's prefix in its cache.

        `data_parallel_rank` is the name that every version of SGLang takes.
        """
        if len(self._ranks) == 1:
            return {}
        return {"data_parallel_rank": place_of(asking_conversation(), self._ranks)}

    def image_problem(self) -> str:
        """Why this engine cannot be given images; empty if it can."""
        if isinstance(self._own_processor, OwnProcessor) or is_native():
            return ""
        version = self._description.get("sglang")
        return f"images need SGLang 0.5.5, 0.5.12, or 0.5.14 and newer; {version} would change ids"

    @property
    def _own_processor(self) -> Any:
        return getattr(self._manager, "mm_processor", None)

    async def _with_images(
        self, ids: Sequence[int], images: Sequence[PlacedImage]
    ) -> dict[str, Any]:
        if problem := self.image_problem():
            raise EngineError(problem)
        own = self._own_processor
        if isinstance(own, OwnProcessor):
            return await own.fields(ids, images)
        return await native_fields(ids, images)

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        """The log-probs of `ids[first:]`; see `agent.engines.scoring`."""
        answer = await self._answer(score_request(ids, first, likeliest), uuid.uuid4().hex)
        if answer is None:
            raise EngineError("the request was aborted")
        return read_scores(answer, ids, first, likeliest)

    async def _answer(
        self, fields: dict[str, Any], request_id: str, read: Read | None = None
    ) -> dict[str, Any] | None:
        """SGLang's answer to one request; None if it was aborted before SGLang had it.

        `read` makes a generation of what was sampled before an interruption.
        """
        self._children.watch()
        if request_id in self._running:
            raise EngineError(
                f"request id {request_id} is already in flight; each request needs its own"
            )
        check_prompt(fields["input_ids"], self._vocab_size)
        task = asyncio.create_task(self._ask(fields, request_id))
        self._running[request_id] = task
        task.add_done_callback(lambda _: self._forget(request_id))
        try:
            return await self._children.answer(task)
        except asyncio.CancelledError:
            if task.cancelled() and not _is_cancelled():  # by `abort`
                return None
            self._stop(request_id)
            raise await interruption(task, read or read_answer) from None

    async def _ask(self, fields: dict[str, Any], request_id: str) -> dict[str, Any]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(rid=request_id, **fields)
        try:
            answer: dict[str, Any] = await anext(self._manager.generate_request(request, None))
        except asyncio.CancelledError:
            raise
        except (
            Exception
        ) as error:  # SGLang raises ValueError, TypeError, HTTPException and others for one request
            raise EngineError(
                f"SGLang refused the request: {getattr(error, 'detail', None) or error}"
            ) from error
        return answer

    def _forget(self, request_id: str) -> None:
        task = self._running.pop(request_id)
        # SGLang keeps the state of a request that was aborted while it waited.
        self._manager.rid_to_state.pop(request_id, None)
        if not task.cancelled():
            task.exception()  # of a request nobody waits for any more

    async def abort(self, request_id: str) -> None:
        """Stops a running or queued request: `generate` returns what was sampled, as
        "abort".
        """
        self._stop(request_id)

    def _stop(self, request_id: str) -> None:
        if request_id in self._manager.rid_to_state:
            self._manager.abort_request(rid=request_id)
        elif task := self._running.get(request_id):
            task.cancel()

    async def close(self) -> None:
        """Ends the engine's processes; requests in flight fail with EngineError.

        Safe to call twice.
        """
        self._children.end("it was closed")
        tasks = [*self._running.values(), *self._manager.asyncio_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._children.stop()


async def interruption(
    answer: asyncio.Future[dict[str, Any]], read: Read
) -> asyncio.CancelledError:
    """The error for a request that was aborted: `Interrupted` with the sampled tokens, once
    SGLang's answer has come.

    Waits for that, ABORT_S at most.
    """
    await asyncio.wait((answer,), timeout=ABORT_S)
    if not answer.done() or answer.cancelled() or answer.exception():
        return asyncio.CancelledError()
    try:
        generation = read(answer.result())
    except EngineError:
        return asyncio.CancelledError()
    return (
        Interrupted(dataclasses.replace(generation, finish_reason="abort"))
        if generation.token_ids
        else asyncio.CancelledError()
    )


def _is_cancelled() -> bool:
    """Whether the running task itself is being cancelled, not only something that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises EngineError for sampling params that SGLang cannot serve ids-only."""
    for key, reason in REFUSED_SAMPLING.items():
        if sampling.get(key):
            raise EngineError(f"sampling param {key!r} is refused: {reason}")
    if sampling.get("n", 1) != 1:
        raise EngineError("sampling param 'n' must be 1: each sample is a request of its own")


def check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raises EngineError for ids outside the model's vocabulary: they kill SGLang's scheduler."""
    if not prompt_ids:
        raise EngineError("the prompt is empty")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise EngineError(
            f"the prompt has an id outside the model's vocabulary of {vocab_size}: "
            f"{max(prompt_ids)} or {min(prompt_ids)}"
        )


def read_answer(answer: Mapping[str, Any], asked: EvidenceRequest | None = None) -> Generation:
    """SGLang's answer to one `/generate` with `return_logprob`, checked.

    Raises EngineError if it is not data.
    """
    try:
        ids, meta = list(answer["output_ids"]), answer["meta_info"]
        reason = meta["finish_reason"]
        triples = meta.get("output_token_logprobs") or []
        logprobs = [float(triple[0]) for triple in triples]
        logprob_ids = [triple[1] for triple in triples]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"the engine's answer lacks what was asked for: {type(error).__name__} {error}"
        ) from error
    if not isinstance(reason, Mapping) or "type" not in reason:
        raise EngineError(f"the engine's answer has finish reason {reason!r}")
    if reason.get("matched") == "NaN happened":
        raise EngineError("NaN happened: the model's logits are not numbers")
    if logprob_ids != ids or not set(map(type, ids)) <= {int}:
        raise EngineError(
            f"the engine returned {len(ids)} ids with {len(logprobs)} log-probs that do not "
            "belong to them"
        )
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("the engine returned a log-prob that is not finite")
    return Generation(
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=reason["type"],
        prompt_tokens=meta.get("prompt_tokens"),
        cached_tokens=_number(meta.get("cached_tokens")),
        queue_s=_number(meta.get("queue_time")),
        engine_s=_number(meta.get("e2e_latency")),
        weight_version=None if (version := meta.get("weight_version")) is None else str(version),
        evidence=read_evidence(meta, asked, len(ids)) if asked else None,
    )


def _number(reported: Any) -> Any:
    """A number reported beside the tokens; None if a record cannot hold it.

    A conversation must not be lost because a latency is NaN.
    """
    return reported if type(reported) in (int, float) and math.isfinite(reported) else None
