"""Part `parallel`: one in-process engine over all GPUs, each with a copy of the model."""

from __future__ import annotations

import functools
from time import perf_counter
from typing import Any

import psutil

from tests.bench.gpu.engine import empty_cache, in_process, stored_contenders
from tests.bench.gpu.load import Load
from tests.bench.gpu.place import Place
from tests.bench.gpu.server import SIZES


def parallel(place: Place) -> None:
    if place.devices < 2:
        why = {"why": f"it needs two GPUs, found {place.devices}"}
        place.figures.add("parallel", "left out", why)
        return
    place.gpu.count = place.devices
    each = max(place.options.sizes) if place.dry else SIZES[-1]
    with place.noting("parallel", "data, ended") as figures:
        _data(place, each * place.devices)
        figures["with"] = "all measured"


def _data(place: Place, size: int) -> None:
    """A copy of the model on each GPU, and the death of one."""
    wanted = f"rollout.data_parallel_size={place.devices}"
    with in_process(place, size, wanted) as (rollout, load):
        place.measure(
            f"parallel, data: {place.devices}",
            stored_contenders(load),
            [size],
            reset=functools.partial(empty_cache, rollout, load),
        )
        with place.noting("parallel", "a data-parallel rank killed under load") as figures:
            figures |= load.loop.run_until_complete(_killed(load, size))


async def _killed(load: Load, size: int) -> dict[str, Any]:
    """How long it takes until every conversation has failed."""
    killed: list[float] = []

    async def kill() -> None:
        processes = psutil.Process().children(recursive=True)
        [*_, rank] = [process for process in processes if "scheduler" in process.name()]
        rank.kill()
        killed.append(perf_counter())

    run = await load.interrupted(size, kill)
    return {**run.figures, "all_ended_after_s": round(perf_counter() - killed[0], 2)}
