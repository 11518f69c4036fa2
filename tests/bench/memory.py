"""Memory of a live conversation beyond its tokens: what Python holds for conversations that wait in
the engine.

Each has made some turns with calls. Counted by tracemalloc, so shared things count once and the
tokenizer's own memory not at all; the token ids (lists and integers) are taken off.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Sequence

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from tests.bench.row import Row
from tests.bench.workload import TOOL_SCHEMA, EchoTool, Workload, tasks
from tests.helpers import runtime

CONVERSATIONS = 2000
TURNS = 3
BUDGET_KIB = 32.0


class WaitingEngine(ScriptedEngine):
    """Answers the first turns of each conversation, then keeps it waiting.

    `waiting` are the sequences it was given.
    """

    def __init__(self, workload: Workload, conversations: int) -> None:
        super().__init__(workload.respond)
        self.waiting: list[Sequence[int]] = []
        self.all_wait = asyncio.Event()
        self._conversations = conversations
        self._asked: dict[int, int] = {}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        asked = self._asked[id(prompt_ids)] = self._asked.get(id(prompt_ids), 0) + 1
        if asked <= TURNS:
            return await super().generate(prompt_ids, sampling, request_id=request_id)
        self.waiting.append(prompt_ids)
        if len(self.waiting) == self._conversations:
            self.all_wait.set()
        await asyncio.Event().wait()
        raise AssertionError("nothing ends this wait but cancellation")


def rows(workload: Workload, *, quick: bool) -> list[Row]:
    """KiB per live conversation."""
    conversations = CONVERSATIONS // 4 if quick else CONVERSATIONS
    kib = asyncio.run(_measure(workload, conversations))
    note = f"{conversations} conversations waiting after {TURNS} turns with a call each"
    return [Row("memory_kib_per_conversation", [kib], limit=BUDGET_KIB, note=note)]


async def _measure(workload: Workload, conversations: int) -> float:
    engine = WaitingEngine(workload, conversations)
    shared = runtime(workload.template, engine, [EchoTool({}, TOOL_SCHEMA)])
    gc.collect()
    tracemalloc.start()
    try:
        run = asyncio.create_task(
            run_tasks(tasks(conversations), shared, max_concurrent=conversations)
        )
        await engine.all_wait.wait()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - _size_of_tokens(engine.waiting)
    finally:
        tracemalloc.stop()
    run.cancel()
    await asyncio.wait([run])
    return held / conversations / 1024


def _size_of_tokens(sequences: list[Sequence[int]]) -> int:
    """Bytes of the lists and of every integer in them that was made for this run."""
    integers = {
        id(token): sys.getsizeof(token)
        for ids in sequences
        for token in ids
        if tracemalloc.get_object_traceback(token)
    }
    return sum(map(sys.getsizeof, sequences)) + sum(integers.values())
