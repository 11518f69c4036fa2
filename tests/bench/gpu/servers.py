"""Part `dp`: one server for each GPU, behind the pool of `sglang_server`: scaling, spread, sticky
caches, one server's death.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.engines.server import Server
from agent.engines.servers import SGLangServerEngine
from tests.bench.gpu.load import TURNS, in_turn
from tests.bench.gpu.place import Place
from tests.bench.gpu.server import (
    SIZES,
    BareHttp,
    ServerProcess,
    contenders,
    empty_caches,
    running,
    server_flags,
)

EACH = SIZES[-1]
"""Conversations for each server."""


class CountingEngine(SGLangServerEngine):
    """The pool, and which server each turn went to."""

    def __init__(self, urls: Sequence[str], **options: Any) -> None:
        super().__init__(urls, **options)
        self.turns: Counter[str] = Counter()
        self.moves = 0
        self._last: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    async def _server(self) -> Server:
        chosen, conversation = await super()._server(), asyncio.current_task()
        self.turns[chosen.url] += 1
        self.moves += self._last.get(conversation, chosen.url) != chosen.url
        self._last[conversation] = chosen.url
        return chosen

    def told(self) -> dict[str, Any]:
        """What was counted since the last time."""
        found = {
            "turns_by_server": [self.turns[server.url] for server in self._servers],
            "conversations_moved": self.moves,
        }
        self.turns.clear()
        self.moves = 0
        return found


def servers(place: Place) -> None:
    if place.devices < 2:
        place.figures.add("dp", "left out", {"why": f"it needs two GPUs, found {place.devices}"})
        return
    each = max(place.options.sizes) if place.dry else EACH
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    place.gpu.count = place.devices
    flags, logs = server_flags(place, each), Path(place.options.logs)
    processes = [
        ServerProcess(place.model, flags, logs / f"server-{gpu}.log", cuda=place.cuda, gpu=gpu)
        for gpu in range(place.devices)
    ]
    with running(processes) as started:
        place.figures.add("dp", "start", started)
        for count in (1, place.devices):
            _measure(place, loop, processes[:count], each)
        _compare(place, each)
        with place.noting("dp", "one server killed under load") as figures:
            figures |= loop.run_until_complete(_killed(place, loop, processes, each))


def _part(count: int) -> str:
    return f"dp, servers: {count}"


def _measure(
    place: Place, loop: asyncio.AbstractEventLoop, processes: Sequence[ServerProcess], each: int
) -> None:
    """As many conversations for each server, whatever their number."""
    size = each * len(processes)
    bare = [BareHttp(process.url) for process in processes]
    engine = CountingEngine([process.url for process in processes], max_connections=size)
    loop.run_until_complete(engine.connect())
    load = place.load(engine, in_turn([one.ask for one in bare]), loop)
    place.measure(
        _part(len(processes)),
        contenders(load, engine),
        [size],
        reset=functools.partial(empty_caches, processes),
    )
    with place.noting("dp", f"spread over {len(processes)}") as figures:
        empty_caches(processes)
        engine.told()
        figures |= {"cached_share": load.ours(size, 0.0).figures()["cached_share"], **engine.told()}
    for one in bare:
        one.close()
    loop.run_until_complete(engine.close())


def _compare(place: Place, each: int) -> None:
    """Tokens/s of all servers as a share of so many times the one's."""
    found = place.figures.read()
    with place.noting(
        "dp", f"tokens/s of {place.devices} servers over {place.devices} times one's"
    ) as figures:
        for name in ("ideal", "client", "ours"):
            one, all_of_them = (
                max(
                    case["tokens_per_s"]
                    for key, case in found[_part(count)].items()
                    if f"conversations, 0 ms, {name}," in key
                )
                for count in (1, place.devices)
            )
            figures[name] = round(all_of_them / (place.devices * one), 3)


async def _killed(
    place: Place, loop: asyncio.AbstractEventLoop, processes: Sequence[ServerProcess], each: int
) -> dict[str, Any]:
    """The first server is killed and stays away: its conversations go on elsewhere."""
    size = each * len(processes)
    engine = CountingEngine([process.url for process in processes], max_connections=size)
    await engine.connect()
    load = place.load(engine, in_turn([]), loop)

    async def kill() -> None:
        processes[0].kill()

    run = await load.interrupted(size, kill)
    told = engine.told()
    await engine.close()
    return {**run.figures, **told, "turns_sent_again": sum(told["turns_by_server"]) - TURNS * size}
