"""Loop CPU a turn with many live conversations: Python's own settings of the garbage collector
beside those of a run's processes, interleaved in one process.

python -m tests.bench.collector [256 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import tempfile
from pathlib import Path
from statistics import median
from time import process_time

from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.runs.collector import settle_collector
from conversations.run.store import RunFolder
from tests.bench.workload import TOOL_SCHEMA, EchoTool, tasks, workload
from tests.helpers import runtime

TURNS = 4
STEP_S = 0.02
"""A turn's time: all conversations live at once, and are in step."""


def turn_ms(live: int) -> float:
    """CPU ms a turn of so many live conversations, records written."""
    work = workload()
    shared = runtime(
        work.template,
        ScriptedEngine(work.respond, delay_s=STEP_S),
        [EchoTool({}, TOOL_SCHEMA)],
        shorten=lambda text: None,
        max_turns=TURNS,
        response_length=1024,
        max_model_len=4096,
    )
    given = tasks(live)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        began = process_time()
        with RunFolder.create(Path(folder) / "run", {}) as store:
            progress = asyncio.run(run_tasks(given, shared, max_concurrent=live, store=store))
        took_s = process_time() - began
    if progress.turns != TURNS * live:
        raise RuntimeError(f"the conversations did not make their turns: {progress}")
    return 1e3 * took_s / progress.turns


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.collector")
    parser.add_argument("live", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    python = gc.get_threshold()
    turn_ms(64)  # the first run of anything also pays for what it loads
    settle_collector()
    settings = {"Python's own": python, "a run's": gc.get_threshold()}
    for live in options.live:
        figures: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(options.rounds):
            for name, threshold in settings.items():
                gc.set_threshold(*threshold)
                figures[name].append(turn_ms(live))
        before, now = figures.values()
        ratio = median(after / first for first, after in zip(before, now, strict=True))
        texts = (f"{name} {min(found):.3f}" for name, found in figures.items())
        print(f"{live:5} live  ms a turn, the least: {', '.join(texts)}; median ratio {ratio:.2f}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
