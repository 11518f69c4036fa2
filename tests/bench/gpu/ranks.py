"""Part `tp`: a trainer's batches through an AgentRollout over all GPUs, a process for each rank as
verl's workers are.

The first rank leads, the others do as it does; batches come back on all of them, and all of them
send the weights. One rank on one GPU is what they are compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.agent.native_api import free_port
from tests.agent.tp_ranks import become_rank
from tests.bench.gpu.engine import raw, start_figures
from tests.bench.gpu.load import Outcome
from tests.bench.gpu.place import Place
from tests.bench.gpu.server import SIZES


def ranks(place: Place) -> None:
    import torch.multiprocessing as processes

    if place.devices < 2:
        place.figures.add("tp", "left out", {"why": f"it needs two GPUs, found {place.devices}"})
        return
    place.model.exists()  # made here, once
    for world in (1, place.devices):
        with place.noting("tp", f"ranks: {world}") as figures:
            processes.spawn(_rank, (world, free_port(), place.options, place.folder), nprocs=world)
            figures["all"] = "ended well"


def _rank(rank: int, world: int, port: int, options: argparse.Namespace, folder: Path) -> None:
    """One rank's process."""
    os.environ["SGLANG_PORT"] = str(free_port())
    become_rank(rank, world, port)
    import torch.distributed as dist

    place = Place(options, folder)
    began = perf_counter()
    rollout, seats = _start(place, world)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        if rank == 0:
            place.figures.add(
                "tp",
                f"ranks: {world}, start",
                start_figures(rollout, seats, perf_counter() - began),
            )
            _lead(place, rollout, world, loop)
        else:
            _follow(rollout)
        _weights(place, rollout, world, loop)
    finally:
        rollout.shutdown()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # no waiting for SGLang's idle threads; what went wrong has been raised by now


def _start(place: Place, world: int) -> tuple[Any, int]:
    """The rank's rollout, made as verl's worker makes it, and how many conversations its engine
    runs at once.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from agent.engines.rollout import MESH_DIMS, rollout_config
    from agent.rollout import AgentRollout
    from tests.bench.verl_peer import model_config

    config = place.config(SIZES[-1], f"rollout.tensor_model_parallel_size={world}")
    mesh = init_device_mesh("cpu", (1, world, 1), mesh_dim_names=MESH_DIMS)
    given = rollout_config({**config.verl_rollout(), "mode": "sync"})
    return AgentRollout(
        given, model_config(place.model), mesh, place.options.logs / f"ranks-{world}.log"
    ), config.rollout.max_num_seqs


def _lead(place: Place, rollout: Any, world: int, loop: asyncio.AbstractEventLoop) -> None:
    """The first rank: what is measured, and when the others take part."""
    from tests.bench.gpu.batches import Batches

    place.gpu.count = world
    place.gpu.start()
    load = place.load(rollout.engine(), raw(rollout), loop)
    batches = Batches(rollout, load, place.model, place.folder)

    def trainer(conversations: int, nap_s: float) -> Outcome:
        rollout.__dict__["_trainer"] = batches.trainer(nap_s)
        _say(conversations)
        outcome, done = batches.run(rollout, conversations)
        if len(set(_digests(done))) != 1:
            raise RuntimeError("the ranks did not return the same batch")
        return outcome

    def empty_the_cache() -> None:
        loop.run_until_complete(rollout._engine.flush_cache())

    sizes = place.options.sizes if place.dry else SIZES
    place.measure(
        f"tp, ranks: {world}",
        {"ideal": load.ideal, "trainer": trainer},
        sizes,
        reset=empty_the_cache,
    )
    _say(0)
    place.gpu.stop()


def _follow(rollout: Any) -> None:
    from tests.bench.gpu.batches import batch

    while conversations := _say(0):
        _digests(rollout.generate_sequences(batch(conversations)))


def _say(conversations: int) -> int:
    """What the first rank says, on all of them: the size of the batch that comes, 0 where none
    does.
    """
    import torch
    import torch.distributed as dist

    said = [conversations]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


def _digests(done: Any) -> list[str]:
    """Of the batch as each rank has it."""
    import torch.distributed as dist

    content = b"".join(
        done.batch[name].cpu().numpy().tobytes() for name in ("responses", "response_mask")
    )
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, hashlib.sha256(content).hexdigest())
    return found


def _weights(place: Place, rollout: Any, world: int, loop: asyncio.AbstractEventLoop) -> None:
    from tests.bench.gpu.sync import Sync

    figures = loop.run_until_complete(Sync(rollout, place.model).rows(2))
    if rollout._engine is not None:
        place.figures.add("tp", f"ranks: {world}, update_weights", figures)
