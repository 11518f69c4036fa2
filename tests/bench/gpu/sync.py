"""What a trainer does between two batches: new weights into the engine, GPU memory given up and
taken back.

Greedy generations tell which weights the engine has.
"""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.rollout import AgentRollout
from tests.bench.gpu.machine import gpu_used_mib, process_mib
from tests.bench.gpu.model import random_weights

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True}
PROMPTS = [[1000 + 7 * index, 2000, 3000 + index] for index in range(16)]


class Sync:
    """Weight syncs and memory releases of one rollout, from the engine's event loop; on all ranks
    at once where there are several.
    """

    def __init__(self, rollout: AgentRollout, model: Path) -> None:
        import torch

        self._rollout, self._model = rollout, model
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    async def said(self) -> list[list[int]]:
        """What the engine says now; nothing on a rank that has none."""
        if self._rollout._engine is None:
            return []
        answers = await asyncio.gather(
            *(
                self._rollout._engine.async_generate(input_ids=ids, sampling_params=GREEDY)
                for ids in PROMPTS
            )
        )
        return [answer["output_ids"] for answer in answers]

    async def send(self, seed: int) -> float:
        """Seconds that a sync of all weights took.

        Ranks go on together: what one sent must be there until it is read.
        """
        import torch.distributed as dist

        weights = list(random_weights(self._model, seed, self._device))
        _synchronize()
        started = perf_counter()
        await self._rollout.update_weights(iter(weights))
        if dist.get_world_size() > 1:
            dist.barrier()
        took_s = perf_counter() - started
        del weights
        _free()
        return took_s

    async def rows(self, times: int) -> dict[str, Any]:
        """Whether outputs follow the weights, and what `times` more syncs leave behind."""
        at_start = await self.said()
        first_s = await self.send(1)
        one = await self.said()
        await self.send(2)
        two = await self.said()
        await self.send(1)
        again = await self.said()
        before = process_mib(), gpu_used_mib()
        took = [await self.send(seed % 2 + 1) for seed in range(times)]
        after = process_mib(), gpu_used_mib()
        return {
            "sync_s_first": round(first_s, 3),
            "sync_s_median": round(sorted(took)[len(took) // 2], 3),
            "outputs_changed": _differing(at_start, one),
            "outputs_changed_by_other_weights": _differing(one, two),
            "outputs_differing_with_the_first_weights_again": _differing(one, again),
            "syncs": times,
            "processes_grew_mib": round(after[0] - before[0], 1),
            "gpu_grew_mib": None
            if after[1] is None or before[1] is None
            else round(after[1] - before[1], 1),
        }

    async def release(self) -> dict[str, Any]:
        """GPU memory freed and taken back, and whether generation goes on right after."""
        await self.send(1)
        before, said = gpu_used_mib(), await self.said()
        started = perf_counter()
        await self._rollout.release()
        release_s, released = perf_counter() - started, gpu_used_mib()
        started = perf_counter()
        await self._rollout.resume(["weights"])
        weights_s = perf_counter() - started
        await self.send(1)
        started = perf_counter()
        await self._rollout.resume(["kv_cache"])
        cache_s, resumed = perf_counter() - started, gpu_used_mib()
        return {
            "used_gib": _gib(before),
            "released_gib": _gib(released),
            "resumed_gib": _gib(resumed),
            "release_s": round(release_s, 2),
            "resume_weights_s": round(weights_s, 2),
            "resume_kv_cache_s": round(cache_s, 2),
            "outputs_differing_afterwards": _differing(said, await self.said()),
        }


def _differing(one: list[list[int]], other: list[list[int]]) -> str:
    whole = sum(a != b for a, b in zip(one, other, strict=True))
    first = sum(a[0] != b[0] for a, b in zip(one, other, strict=True))
    return f"{whole} of {len(one)}, in the first token {first}"


def _gib(mib: float | None) -> float | None:
    return None if mib is None else round(mib / 1024, 2)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
