"""A cluster of two nodes on this machine, one of them killed under load: nothing is lost.

python -m tests.agent.workers.nodes

Prints what was seen; the exit code is 1 where a conversation is lost or there twice. It takes about
a minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from agent.config.config import load_config
from agent.loop.batch import Progress, run_tasks
from agent.loop.tasks import read_tasks
from agent.runs.manifest import save_tokenizer
from agent.runs.parts import config_tools, prepare
from agent.workers.cluster import QUIET
from agent.workers.pool import WorkerPool
from conversations.run.store import RunFolder, read_trajectories
from conversations.verify import verify_run
from tests.agent.workers.project import write_project

CONVERSATIONS, TURNS, NAP_S = 200, 4, 1.0


def main() -> int:
    from ray.cluster_utils import Cluster

    os.environ.update({"USE_TORCH": "0", **QUIET})
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _run(Path(folder) / "project", cluster, second)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    print(json.dumps(found, indent=1))
    return int(found["lost"] or found["twice"] or found["infra_errors"] or found["defects"])


def _run(folder: Path, cluster: object, second: object) -> dict[str, int | float]:
    """The run; the node with two of the three workers is killed when a tenth is done."""
    questions = [f"question {index}" for index in range(CONVERSATIONS)]
    write_project(folder, questions, turns=TURNS)
    (folder / "nap_s").write_text(str(NAP_S))
    sys.path.append(str(folder))
    config = load_config(folder / "config.yaml", ["rollout.max_num_seqs=48"])
    parts = prepare(config, config_tools(config))
    progress, out = Progress(total=CONVERSATIONS), folder / "run"
    found: dict[str, int | float] = {}

    async def disturbed(pool: WorkerPool, store: RunFolder) -> None:
        running = asyncio.ensure_future(
            run_tasks(
                read_tasks(folder / "tasks.jsonl"),
                pool.runtime,
                make=pool.making({}),
                converse=pool.converse,
                max_concurrent=pool.max_concurrent,
                store=store,
                progress=progress,
            )
        )
        while progress.done < CONVERSATIONS // 10:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.05)
        found["done_before"], found["live_before"] = progress.done, progress.running
        began = perf_counter()
        await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)  # type: ignore[attr-defined]
        await running
        found["rest_took_s"] = round(perf_counter() - began, 1)

    address = str(cluster.address)  # type: ignore[attr-defined]
    with (
        RunFolder.create(out, {}) as store,
        WorkerPool(parts, 3, address, say=print) as pool,
    ):
        save_tokenizer(out, parts.template.tokenizer)
        pool.run(disturbed(pool, store))
    records = Counter(record.id for record in read_trajectories(out))
    return found | {
        "records": len(records),
        "lost": CONVERSATIONS - len(records),
        "twice": sum(records.values()) - len(records),
        "infra_errors": progress.infra_errors,
        "defects": verify_run(out).defects,
    }


if __name__ == "__main__":
    sys.exit(main())
