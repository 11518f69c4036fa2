"""The log-probs of the sampling call against those of a prefill over the same tokens: what a
trainer's ratio starts from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.rollout import AgentRollout

SAMPLED = 128


async def differences(rollout: AgentRollout, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Of |sampling - prefill| per token, at temperature 1, the cache empty in between: mean, p50,
    p99, max.

    `k3` is the mean of exp(d) - 1 - d with d = prefill - sampling (Schulman's estimate of the KL
    divergence).
    """
    import numpy as np

    sampled = await asyncio.gather(*(_sample(rollout, ids) for ids in prompts))
    await rollout._engine.flush_cache()
    again = await asyncio.gather(
        *(
            _prefill(rollout, ids, answer["output_ids"])
            for ids, answer in zip(prompts, sampled, strict=True)
        )
    )
    first = np.concatenate(
        [
            [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
            for answer in sampled
        ]
    )
    second = np.concatenate(again)
    size = np.abs(first - second)
    change = second - first
    return {
        "tokens": int(size.size),
        "mean_logprob": round(float(first.mean()), 4),
        "mean_abs": round(float(size.mean()), 5),
        "p50": round(float(np.percentile(size, 50)), 5),
        "p99": round(float(np.percentile(size, 99)), 5),
        "max": round(float(size.max()), 4),
        "mean_signed": round(float(change.mean()), 6),
        "k3": round(float((np.exp(change) - 1 - change).mean()), 6),
    }


async def _sample(rollout: AgentRollout, ids: list[int]) -> Any:
    sampling = {"temperature": 1.0, "max_new_tokens": SAMPLED}
    return await rollout._engine.async_generate(
        input_ids=ids, sampling_params=sampling, return_logprob=True
    )


async def _prefill(rollout: AgentRollout, ids: list[int], sampled: list[int]) -> list[float]:
    """The log-prob of each sampled token, all of them in one forward pass."""
    sampling = {"temperature": 1.0, "max_new_tokens": 1, "ignore_eos": True}
    answer = await rollout._engine.async_generate(
        input_ids=ids + sampled, sampling_params=sampling, return_logprob=True, logprob_start_len=0
    )
    triples = answer["meta_info"]["input_token_logprobs"][-len(sampled) :]
    if [token for _, token, *_ in triples] != sampled:
        raise RuntimeError(
            "the engine's log-probs of the input are not those of the sampled tokens"
        )
    return [value for value, *_ in triples]
