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
from agent.engines.sglang_args import start_variables

WORLD = 2


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= {**start_variables(cuda=False), "CUDA_VISIBLE_DEVICES": str(rank), "ASCEND_RT_VISIBLE_DEVICES": str(rank)}
    cpu_guards.install()
    import torch.distributed as dist

    dist.init_process_group("gloo")
    from tests.agent.trainer_peer import Peers, Script, batch
    from tests.helpers import qwen_template

    template = qwen_template("qwen2_5")
    peers = Peers(Path(folder) / str(rank), template, ranks=WORLD)
    said = Script(template, lambda text: "It is 42.")
    rollout = peers.ours(said if rank == 0 else None, tensor_model_parallel_size=WORLD, calculate_log_probs=True)
    given = batch(template, ["one", "two"])
    done = peers.run(rollout, given)
    told: dict[str, Any] = {"rank": rank, "responses": done.batch["responses"].tolist(), "mask": int(done.batch["response_mask"].sum())}
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
