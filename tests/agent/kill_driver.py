"""Runs 64 conversations at a time into a run folder, for `test_kill.py` to kill.

python -m tests.agent.kill_driver FOLDER TASKS

Imports once, then forks one child for each line "go SEED" on its stdin and prints the child's pid;
the child opens the run folder as the command line does and runs all tasks. When a child is gone its
exit status is printed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.engines.engine import Generation, SamplingParams
from agent.errors import EngineError
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task
from conversations.run.store import RUN, RunFolder
from conversations.template import ChatTemplate
from tests.helpers import call, float32, hermes_template
from tools.function import tool
from tools.toolset import ToolSet

MANIFEST = {"config": {"rollout": {"name": "scripted"}}, "n": 1}


class Slow:
    """A slow engine: two calls, then an answer. Now and then it fails."""

    def __init__(self, template: ChatTemplate, rng: random.Random) -> None:
        self._template, self._rng = template, rng
        texts = (
            f"Let me see.\n{call('double', number=21)}",
            f"Once more.\n{call('double', number=4)}",
            "It is 42.",
        )
        self._turns = [[*template.encode(text), template.end_id] for text in texts]
        self._start = template.encode("<|im_start|>")[0]

    def describe(self) -> dict[str, Any]:
        return {"name": "slow"}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        turn = (
            list(prompt_ids).count(self._start) - 3
        ) // 2  # system, user and assistant stand before the first
        await asyncio.sleep(self._rng.uniform(0.0, 0.06))
        if self._rng.random() < 0.02:
            raise EngineError("a bad moment")
        ids = self._turns[turn]
        return Generation(ids, [float32(self._rng) for _ in ids], "stop")

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


@tool
async def double(number: int) -> str:
    """Doubles a number."""
    await asyncio.sleep(0.005)
    return str(2 * number)


def tasks(count: int) -> Iterator[Task]:
    for number in range(count):
        yield Task(f"task{number}", [{"role": "user", "content": f"What is {number} times two?"}])


def run(folder: Path, count: int, seed: str, template: ChatTemplate) -> None:
    """One attempt at the whole run: a new folder, or the old one resumed."""
    dispatcher = Dispatcher(
        ToolSet.from_tools([double]), max_parallel_calls=4, shorten=lambda text: None
    )
    runtime = Runtime(
        Slow(template, random.Random(seed)), template, LoopSettings(4096, 4096, 8192), dispatcher
    )
    with (
        RunFolder.resume(folder, MANIFEST)
        if (folder / RUN).exists()
        else RunFolder.create(folder, MANIFEST) as store
    ):
        asyncio.run(run_tasks(tasks(count), runtime, max_concurrent=64, store=store))
        store.close({"done": len(store.done)})


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    template = hermes_template()
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            run(folder, count, line, template)
            os._exit(0)


if __name__ == "__main__":
    main()
