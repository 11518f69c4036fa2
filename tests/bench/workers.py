"""`--workers` on the scripted engine: turns a second beside no workers, what the run's own process
spends on a conversation, and many live conversations whose workers are killed.

python -m tests.bench.workers [--live N] [--quick]

The engine costs nothing, so a worker is as busy as its event loop allows. What the run's process
spends on a conversation is the ceiling: with workers enough, it hands out and writes so many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import psutil

from agent.config.config import Config, load_config
from agent.engines.engine import Engine
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import Progress, run_tasks
from agent.runs.parts import config_tools, prepare
from agent.runs.session import Session
from agent.workers.pool import WorkerPool
from conversations.run.store import RunFolder, read_trajectories
from tests.bench.row import Row
from tests.bench.workload import TOOL_SCHEMA, tasks, workload

TURNS = 16
NUMBERS = (None, 1, 2, 4)
CONVERSATIONS = 1000
AT_ONCE = 64
LIVE_TURNS = 3
LIVE_DELAY_S = 15.0
KILLS = 5


@dataclass(frozen=True)
class Start:
    """Starts the scripted engine of a worker: each turn takes `delay_s`."""

    delay_s: float = 0.0

    def __call__(self, config: Config, log: Path | None) -> Engine:
        return ScriptedEngine(workload().respond, delay_s=self.delay_s)


@dataclass(frozen=True)
class Measured:
    turns_per_s: float
    own_ms: float
    """CPU of the run's own process for each conversation."""


def rows(*, quick: bool) -> list[Row]:
    """Turns a second for each number of workers."""
    found = []
    with _folder() as folder:
        config = _config(folder, TURNS)
        for number in NUMBERS:
            got = _measure(config, folder, number, CONVERSATIONS // (5 if quick else 1))
            case = f"workers={number or 'none'}"
            more = {"own_process_cpu_ms_per_conversation": round(got.own_ms, 3)}
            note = f"the run's own process: {got.own_ms:.2f} ms of CPU a conversation"
            row = Row("turns_per_s", [got.turns_per_s], case=case, note=note, more=more)
            found.append(row)
    return found


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _config(folder: Path, turns: int) -> Config:
    """`recorded` is not read: `Start` makes the engine."""
    tools = folder / "tools.yaml"
    entry = {"class_name": "tests.bench.workload.EchoTool", "tool_schema": TOOL_SCHEMA}
    tools.write_text(json.dumps([{**entry, "config": {}}]))
    rollout = {
        "name": "scripted",
        "prompt_length": 512,
        "response_length": 128 * turns,
        "max_num_seqs": AT_ONCE,
        "multi_turn": {
            "enable": True,
            "max_assistant_turns": turns,
            "tool_config_path": str(tools),
        },
        "turntrace": {"recorded": str(folder)},
    }
    path = folder / f"config-{turns}.yaml"
    model = str(workload().template.tokenizer.name_or_path)
    path.write_text(json.dumps({"model_path": model, "rollout": rollout}))
    return load_config(path)


def _measure(config: Config, folder: Path, number: int | None, conversations: int) -> Measured:
    parts = prepare(config, config_tools(config))
    if number is None:
        with Session(parts, start=lambda: Start()(config, None)) as session:
            _run(session, folder, AT_ONCE)
            return _run(session, folder, conversations)
    with WorkerPool(parts, number, start=Start()) as pool:
        options = {"make": pool.making({}), "converse": pool.converse}
        _run(pool, folder, number * AT_ONCE, **options)
        return _run(pool, folder, conversations, **options)


def _run(place: Session | WorkerPool, folder: Path, count: int, **options: Any) -> Measured:
    progress, out = Progress(), folder / f"run-{count}-{perf_counter()}"
    given = tasks(count)
    began, cpu = perf_counter(), process_time()
    with RunFolder.create(out, {}) as store:
        place.run(
            run_tasks(
                given,
                place.runtime,
                max_concurrent=AT_ONCE * (os.cpu_count() or 1),
                store=store,
                progress=progress,
                **options,
            )
        )
    took_s, cpu_s = perf_counter() - began, process_time() - cpu
    if progress.turns != TURNS * count:
        raise RuntimeError(f"the conversations did not make their turns: {progress}")
    return Measured(progress.turns / took_s, 1e3 * cpu_s / count)


# ---------------------------------------------------------------------- many, and killed workers


def live(count: int) -> dict[str, Any]:
    """So many conversations alive at once in two workers, one of which is killed five times."""
    with _folder() as folder:
        config = _config(folder, LIVE_TURNS)
        parts = prepare(config, config_tools(config))
        with WorkerPool(parts, 2, start=Start(LIVE_DELAY_S), say=print) as pool:
            return pool_run(pool, folder / "run", count)


def pool_run(pool: WorkerPool, out: Path, count: int) -> dict[str, Any]:
    """The run, and what it came to."""
    progress, found = Progress(total=count), dict[str, Any]()
    given = tasks(count)

    async def watched(store: RunFolder) -> None:
        before = _memory(pool)
        running = asyncio.ensure_future(
            run_tasks(
                given,
                pool.runtime,
                make=pool.making({}),
                converse=pool.converse,
                max_concurrent=count,
                store=store,
                progress=progress,
            )
        )
        turns = -1
        while pool.so_far()[0] != turns or turns <= 0:  # until all have made their first turn
            turns = pool.so_far()[0]
            await asyncio.sleep(LIVE_DELAY_S / 4)
        found["live"] = progress.running
        after = _memory(pool)
        found["own_kib_each"] = round((after[0] - before[0]) / progress.running / 1024, 1)
        found["worker_kib_each"] = round((after[1] - before[1]) / progress.running / 1024, 1)
        found["kills"] = 0
        while not running.done() and found["kills"] < KILLS:
            if len(pool.processes()) == 2:
                print(f"{progress.done} done, {progress.running} live: killing", flush=True)
                os.kill(pool.processes()[found["kills"] % 2][1], signal.SIGKILL)
                found["kills"] += 1
            await asyncio.sleep(LIVE_DELAY_S / 4)
        await running

    began = perf_counter()
    with RunFolder.create(out, {}) as store:
        pool.run(watched(store))
    records = [(record.id, record.infra_error) for record in read_trajectories(out)]
    return found | {
        "wall_s": round(perf_counter() - began, 1),
        "records": len(records),
        "twice": len(records) - len({name for name, _ in records}),
        "infra_errors": sum(failed for _, failed in records),
        "lost": count - len({name for name, _ in records}),
    }


def _memory(pool: WorkerPool) -> tuple[int, int]:
    """Resident bytes of this process, and of the workers together."""
    sizes = [psutil.Process(pid).memory_info().rss for _, pid in pool.processes()]
    return psutil.Process().memory_info().rss, sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.workers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--live", type=int, metavar="N", help="only: N live conversations")
    parser.add_argument("--quick", action="store_true", help="fewer conversations")
    options = parser.parse_args()
    if options.live:
        print(json.dumps(live(options.live)))
        return
    for row in rows(quick=options.quick):
        print("  ".join(filter(None, row.cells())))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
