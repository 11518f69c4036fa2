"""Two tensor-parallel ranks of one AgentRollout on CPU: `python -m tests.agent.tp_ranks FOLDER`. Prints a JSON line a rank.

The first has the (scripted) engine, the second none, as verl's workers have it; gloo between them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.multiprocessing as processes

from agent.engines import cpu_guards
from agent.engines.arguments import start_variables

WORLD = 2


def become_rank(rank: int, world: int, port: int) -> None:
    """Makes this process one rank of `world`, on a GPU of its own where there is one, as a trainer starts its workers."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = (
        listed.split(",")[rank] if listed else str(rank)
    )  # before anything asks CUDA what is there
    named = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {
        **{key: str(value) for key, value in named.items()},
        "CUDA_VISIBLE_DEVICES": own,
        "ASCEND_RT_VISIBLE_DEVICES": own,
    }
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    os.environ |= start_variables(cuda=cuda)
    if cuda:
        torch.zeros(
            1, device="cuda"
        )  # holds on to the one GPU: verl names all of them to the engine's processes later
    else:
        cpu_guards.install()
        cores = sorted(
            os.sched_getaffinity(0)
        )  # SGLang's CPU engine wants its ranks on cores of their own
        os.environ.setdefault(
            "SGLANG_CPU_OMP_THREADS_BIND",
            "|".join(str(cores[index % len(cores)]) for index in range(world)),
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def rank_main(rank: int, folder: str, port: int) -> None:
    become_rank(rank, WORLD, port)
    import torch.distributed as dist

    from tests.agent.trainer_peer import Peers, Script, batch
    from tests.helpers import qwen_template

    template = qwen_template("qwen2_5")
    peers = Peers(Path(folder) / str(rank), template, ranks=WORLD)
    said = Script(template, lambda text: "It is 42.")
    rollout = peers.ours(
        said if rank == 0 else None, tensor_model_parallel_size=WORLD, calculate_log_probs=True
    )
    given = batch(template, ["one", "two"])
    done = peers.run(rollout, given)
    told: dict[str, Any] = {
        "rank": rank,
        "responses": done.batch["responses"].tolist(),
        "mask": int(done.batch["response_mask"].sum()),
    }
    given.non_tensor_batch.pop("raw_prompt")
    try:
        peers.run(rollout, given)
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    print("RANK " + json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.agent.native_api import free_port

    processes.spawn(rank_main, (sys.argv[1], free_port()), nprocs=WORLD)
