"""Part `engine`: every contender on one in-process engine; weights and memory as a trainer handles
them.

Importing this imports nothing heavy; what it runs imports torch, sglang and verl.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.runs.collector import settle_collector
from tests.bench.gpu.load import Load
from tests.bench.gpu.place import Contender, Place

SHARED_MEMORY = Path("/dev/shm")
SYNC_S = 30.0
"""What weights and memory take."""


def engine(place: Place) -> None:
    with in_process(place) as (rollout, load):
        _load(place, rollout, load)
        _apart(place, rollout, load)
        _sync(place, rollout, load)


@contextmanager
def in_process(
    place: Place, conversations: int | None = None, *overrides: str, model: Path | None = None
) -> Iterator[tuple[Any, Load]]:
    """An AgentRollout in this process and the load on it; both live on the main thread's event
    loop, as in a trainer.
    """
    from agent.engines.start import starting

    model = model or place.model
    config, began = place.config(conversations, *overrides), perf_counter()
    with starting():
        from agent.rollout import AgentRollout

        log = place.options.logs / "engine.log"
        rollout = AgentRollout.alone(config.verl_rollout(), model, log)
    place.figures.add(
        "machine",
        f"engine's start{''.join(f', {one}' for one in overrides)}",
        start_figures(rollout, config.rollout.max_num_seqs, perf_counter() - began),
    )
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    settle_collector()  # as a run does
    try:
        yield rollout, place.load(rollout.engine(), raw(rollout), loop, model)
    finally:
        with suppress(Exception):
            loop.run_until_complete(rollout.engine().close())
        rollout.shutdown()


def start_figures(rollout: Any, seats: int, took_s: float) -> dict[str, Any]:
    """How long an engine took to start, and how much it holds where this SGLang tells."""
    told = getattr(rollout._engine, "scheduler_info", None)
    with suppress(AttributeError, IndexError):
        told = (
            told or rollout._engine._scheduler_init_result.scheduler_infos[0]
        )  # as SGLang 0.5.12 has it
    return {
        "start_s": round(took_s, 1),
        "max_num_seqs": seats,
        "kv_tokens": (told or {}).get("max_total_num_tokens"),
    }


def raw(rollout: Any) -> Any:
    """What the ideal loop awaits of an engine in this process."""

    async def ask(ids: list[int], sampling: dict[str, Any]) -> Any:
        return await rollout._engine.async_generate(
            input_ids=ids, sampling_params=sampling, return_logprob=True
        )

    return ask


def _load(place: Place, rollout: Any, load: Load) -> None:
    """The two that take a trainer's batches run in the first round only."""
    from tests.bench.gpu.batches import Batches

    batches = Batches(rollout, load, place.model, place.folder)
    contenders: dict[str, Contender] = {
        **stored_contenders(load),
        "trainer": batches.ours,
        "verl": batches.verl,
    }

    place.measure(
        "load",
        contenders,
        place.options.sizes,
        reset=functools.partial(empty_cache, rollout, load),
        once=("trainer", "verl"),
    )


def _apart(place: Place, rollout: Any, load: Load) -> None:
    """Conversations that end at different times in life."""
    place.measure(
        "apart",
        stored_contenders(load, apart=True),
        place.options.sizes,
        reset=functools.partial(empty_cache, rollout, load),
    )


def stored_contenders(load: Load, **how: bool) -> dict[str, Contender]:
    """The ideal, and ours without and with records on disk."""
    folder = SHARED_MEMORY / f"turntrace-{os.getpid()}"
    return {
        "ideal": functools.partial(load.ideal, **how),
        "ours": functools.partial(load.ours, **how),
        "stored": functools.partial(load.ours, folder=folder, **how),
    }


def empty_cache(rollout: Any, load: Load) -> None:
    load.loop.run_until_complete(rollout._engine.flush_cache())


def _sync(place: Place, rollout: Any, load: Load) -> None:
    """Weights and memory."""
    from tests.bench.gpu.sync import Sync

    if place.left_s < SYNC_S:
        print(f"sync: left out, {place.left_s:.0f} s are left", flush=True)
        return
    weights, run = Sync(rollout, place.model), load.loop.run_until_complete
    with place.noting("sync", "update_weights") as figures:
        figures |= run(weights.rows(2 if place.dry else 10))
    with place.noting("sync", "in flight") as figures:
        figures |= run(
            load.interrupted(min(place.options.sizes), functools.partial(weights.send, 3))
        ).figures
    with place.noting("sync", "release and resume") as figures:
        figures |= run(weights.release())
