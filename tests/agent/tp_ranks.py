"""Two tensor-parallel ranks of one AgentRollout on CPU: `python -m tests.agent.tp_ranks FOLDER`.

The first rank has the (scripted) engine, the second none, as verl's workers have it; gloo between
them. Each writes `rank-R.json` in FOLDER: two processes' lines in one pipe would interleave.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.multiprocessing as processes

from agent.engines import cpu_guards
from agent.engines.arguments import start_variables
from tests.agent.native_api import free_port
from tests.command import HAS_GPU

WORLD = 2


def become_rank(rank: int, world: int, port: int) -> None:
    """Makes this process one rank of `world`, as a trainer starts its workers.

    Each rank gets a GPU of its own if there is one. Call it before anything asks CUDA.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = listed.split(",")[rank] if listed else str(rank)
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
        # Holds on to the one GPU: verl names all of them to the engine's processes later.
        torch.zeros(1, device="cuda")
    else:
        cpu_guards.install()
        # SGLang's CPU engine wants its ranks on cores of their own.
        cores = sorted(os.sched_getaffinity(0))
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
    outcome: dict[str, Any] = {
        "responses": done.batch["responses"].tolist(),
        "mask": int(done.batch["response_mask"].sum()),
    }
    given.non_tensor_batch.pop("raw_prompt")
    try:
        peers.run(rollout, given)
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def main() -> None:
    """Both ranks are forked from this process once it has imported what they need, if there is no
    CUDA, which survives no fork.
    """
    method = "spawn" if HAS_GPU else "fork"
    if not HAS_GPU:
        os.environ |= start_variables(cuda=False)
        cpu_guards.install()
        importlib.import_module("tests.agent.trainer_peer")
    arguments = (sys.argv[1], free_port())
    processes.start_processes(rank_main, arguments, nprocs=WORLD, start_method=method)


if __name__ == "__main__":
    main()
