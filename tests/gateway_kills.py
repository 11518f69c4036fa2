"""Kills a gateway again and again while programs use it: `python -m tests.gateway_kills 20`.

Each of the sessions says a number of turns; a request that fails is sent again, as every harness
does. Afterwards each session must have each of its turns once, in one sequence, and the run no
defect.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.agent.gateway.live import checked
from tests.helpers import ROOT

RETRY_S = 0.05


@dataclass
class Killer:
    """Starts gateways on one port and kills them."""

    port: int
    out: Path
    zygote: subprocess.Popen[str] = field(init=False)
    pid: int = 0

    def __post_init__(self) -> None:
        self.zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.agent.gateway.forked"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> None:
        self._tell(f"{self.port} {self.out}")
        self.pid = int(self._line())

    def end(self, number: int) -> None:
        """Sends a signal and waits until the gateway is gone."""
        os.kill(self.pid, number)
        assert self._line() == "gone"

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        assert self.zygote.stdin
        self.zygote.stdin.close()
        self.zygote.wait(60)

    def _tell(self, line: str) -> None:
        assert self.zygote.stdin
        self.zygote.stdin.write(f"{line}\n")
        self.zygote.stdin.flush()

    def _line(self) -> str:
        assert self.zygote.stdout
        return self.zygote.stdout.readline().strip()


@dataclass
class Counts:
    """What happened."""

    turns: int = 0
    retries: int = 0


async def insist(
    http: aiohttp.ClientSession, counts: Counts, url: str, body: Any, key: str = ""
) -> Any:
    """The answer, however often it takes; None if the session is finished."""
    while True:
        with suppress(aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError):
            async with http.post(
                url, json=body, headers={"authorization": f"Bearer {key}"}
            ) as answer:
                if answer.status == 200:
                    return await answer.json()
                if answer.status in (400, 404):
                    return None
                assert answer.status == 503, await answer.text()
        counts.retries += 1
        await asyncio.sleep(RETRY_S)


async def program(
    http: aiohttp.ClientSession, counts: Counts, url: str, opened: Any, turns: int
) -> None:
    """One session: `turns` turns, each after the whole history, then its end."""
    messages: list[Any] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"say {opened['task_id']} {turn}"})
        body = {"model": "m", "messages": messages}
        answer = await insist(http, counts, f"{url}/v1/chat/completions", body, opened["api_key"])
        message = answer["choices"][0]["message"]
        assert message["content"] == f"{opened['task_id']} {turn}"
        messages.append(message)
        counts.turns += 1
    await insist(http, counts, f"{url}/sessions/{opened['id']}/finish", {"reward": 1.0})


async def run(killer: Killer, kills: int, sessions: int, turns: int, every_s: float) -> Counts:
    """All programs, and `kills` kills while they run."""
    url, counts, rng = f"http://127.0.0.1:{killer.port}", Counts(), random.Random(7)
    killer.start()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        opened = [
            await insist(http, counts, f"{url}/sessions", {"task_id": f"s{number}"})
            for number in range(sessions)
        ]
        programs = [asyncio.create_task(program(http, counts, url, one, turns)) for one in opened]
        for _ in range(kills):
            before = counts.turns
            while counts.turns == before and not all(one.done() for one in programs):  # noqa: ASYNC110
                await asyncio.sleep(0.005)  # each start serves at least a turn
            await asyncio.sleep(every_s * rng.random())
            await asyncio.to_thread(killer.end, signal.SIGKILL)
            killer.start()
        await asyncio.gather(*programs)
    await asyncio.to_thread(killer.end, signal.SIGTERM)
    return counts


def nothing_lost_nothing_twice(out: Path, sessions: int, turns: int) -> None:
    """Each session has each of its turns once, in one sequence."""
    found = checked(out).trajectories
    assert len(found) == sessions
    for record in found.values():
        said = [one["content"] for one in record.messages if one["role"] == "assistant"]
        assert said == [f"{record.task_id} {turn}" for turn in range(turns)]
        assert (record.branches, record.reward) == ([], 1.0)


def kill_all(out: Path, kills: int, sessions: int, turns: int, every_s: float = 0.3) -> Counts:
    """Runs it and checks the run. Raises AssertionError if a turn was lost or came twice."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    killer = Killer(port, out)
    try:
        counts = asyncio.run(run(killer, kills, sessions, turns, every_s))
    finally:
        killer.close()
    nothing_lost_nothing_twice(out, sessions, turns)
    return counts


if __name__ == "__main__":
    kills, sessions, turns = (*map(int, sys.argv[1:]), *(20, 32, 200)[len(sys.argv) - 1 :])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_all(Path(folder) / "run", kills, sessions, turns)
    print(
        f"{kills} kills, {sessions} sessions of {turns} turns, {counts.turns} turns, "
        f"{counts.retries} requests sent again: nothing lost, nothing twice "
        f"({time.perf_counter() - started:.0f} s)"
    )
