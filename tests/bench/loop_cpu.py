"""CPU of the loop: process CPU from a task to its written record, over turns, ours and verl's in
one process.

Both contenders run the same turns, interleaved repeat by repeat, with the garbage collector on and
what was imported frozen (as a session does), so that a collection costs each what its own objects
cost. Ours also runs the last turn's call, which verl drops, and writes its records to disk; verl's
end at its DataProto in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING

from agent.engines import cpu_guards
from agent.engines.arguments import start_variables
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import Progress, run_tasks
from conversations.run.store import RunFolder
from conversations.truncate import cut_to_tokens
from tests.bench.row import Row
from tests.bench.workload import TOOL_SCHEMA, EchoTool, Workload, tasks
from tests.helpers import runtime

if TYPE_CHECKING:
    from tests.bench.verl_peer import VerlPeer

METRIC = "loop_cpu_ms_per_turn"
TURNS = (4, 16, 64)
TURNS_OF_A_REPEAT = 2048
"""Ours runs as many conversations as make that many turns."""
BUDGET_MS = 0.2

CHECKS = {"disable": "verl 0.6.1, check off", "strict": "verl 0.6.1, check on"}
PEER_CONVERSATIONS = {"disable": {4: 48, 16: 12, 64: 4}, "strict": {4: 16, 16: 4, 64: 1}}
"""As few as give a steady figure: the check's cost grows with the square of the turns."""

Figures = dict[tuple[str, int], list[float]]
"""CPU ms per turn by (contender, turns), one a repeat; contenders are "ours" and verl's check
modes.
"""


def rows(workload: Workload, *, quick: bool) -> list[Row]:
    """A row for each number of turns, without and with the peer's check, and how flat ours is."""
    with _peer(workload) as peer:
        figures, floors = _measure(workload, peer, repeats=3 if quick else 7)
    flatness = [
        last / first
        for first, last in zip(figures["ours", TURNS[0]], figures["ours", TURNS[-1]], strict=True)
    ]
    return [
        *(_row(figures, median(floors), check, turns) for check in CHECKS for turns in TURNS),
        Row("loop_cpu_flatness", flatness, note=f"ours at {TURNS[-1]} turns / at {TURNS[0]}"),
    ]


def _row(figures: Figures, floor: float, check: str, turns: int) -> Row:
    ours, peer = figures["ours", turns], figures[check, turns]
    times, peer_times = median(ours) / floor, median(peer) / floor
    return Row(
        METRIC,
        ours,
        case=f"turns={turns}" if check == "disable" else f"turns={turns}, check on",
        peer=peer,
        peer_name=CHECKS[check],
        limit=BUDGET_MS,
        note=f"floor {floor:.3g}: ours {times:.1f}x, peer {peer_times:.0f}x",
        more={
            "floor": round(floor, 4),
            "ours_per_floor": round(times, 2),
            "peer_per_floor": round(peer_times, 1),
        },
    )


def _measure(workload: Workload, peer: VerlPeer, repeats: int) -> tuple[Figures, list[float]]:
    figures: Figures = defaultdict(list)
    floors: list[float] = []
    ours_ms(workload, TURNS[0])  # the first run of anything also pays for what it loads
    peer.cpu_ms(TURNS[0], 1, "disable")
    gc.collect()
    gc.freeze()
    for repeat in range(repeats):
        for turns in TURNS:
            floors.append(workload.floor_ms(TURNS_OF_A_REPEAT))
            figures["ours", turns].append(ours_ms(workload, turns))
            for check in CHECKS:
                if repeat < (3 if check == "disable" else 1):
                    figures[check, turns].append(
                        peer.cpu_ms(turns, PEER_CONVERSATIONS[check][turns], check)
                    )
    gc.unfreeze()
    return figures, floors


def ours_ms(workload: Workload, turns: int) -> float:
    """CPU ms per turn of ours."""
    gc.collect()
    conversations = TURNS_OF_A_REPEAT // turns
    with tempfile.TemporaryDirectory() as folder:
        started = process_time()
        progress = asyncio.run(_run(workload, turns, conversations, Path(folder) / "run"))
        took_s = process_time() - started
    if (
        progress.turns != turns * conversations
        or progress.tool_calls != progress.turns
        or progress.tool_errors
    ):
        raise RuntimeError(f"ours did not make the scripted turns and calls: {progress}")
    return 1e3 * took_s / progress.turns


async def _run(workload: Workload, turns: int, conversations: int, folder: Path) -> Progress:
    room = 128 * turns
    shared = runtime(
        workload.template,
        ScriptedEngine(workload.respond),
        [EchoTool({}, TOOL_SCHEMA)],
        shorten=lambda text: cut_to_tokens(text, 256, "middle", workload.template),
        max_turns=turns,
        response_length=room,
        max_model_len=4096 + room,
    )
    with RunFolder.create(folder, {}) as store:
        return await run_tasks(tasks(conversations), shared, store=store)


@contextlib.contextmanager
def _peer(workload: Workload) -> Iterator[VerlPeer]:
    """verl, imported as an engine's start imports it, on one thread: more would only cost it."""
    import torch

    cpu_guards.install()
    os.environ.update(
        start_variables(cuda=torch.cuda.is_available()), TOKENIZERS_PARALLELISM="false"
    )
    torch.set_num_threads(1)
    policy = asyncio.get_event_loop_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.bench.verl_peer import VerlPeer

        asyncio.set_event_loop_policy(policy)  # SGLang's import replaces it
        peer = VerlPeer(workload)
        try:
            yield peer
        finally:
            peer.close()
