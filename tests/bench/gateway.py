"""Many sessions at once: `python -m tests.bench.gateway --sessions 1000 --rate 100 --seconds 60`.

A gateway in a process of its own on a scripted engine (each turn takes 0.6 s, 60 tokens), and a
client process that replays each session's whole history at every turn, at a steady rate over all
sessions. Printed: turns, lost ones, CPU a turn, event loop lag, memory a session. A turn is lost if
its answer is not 200 or not the next one of its session; afterwards each session's record must have
exactly its turns, without a branch. A third process does nothing but measure its own event loop's
lag: what it finds is the machine's doing, not the gateway's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from agent.engines.engine import Generation
from agent.engines.scripted import ScriptedEngine
from agent.gateway.health import LoopLag
from conversations.session.ids import PathIds
from tests.agent.gateway.live import gateway_config_of, live
from tests.helpers import ROOT, hermes_template, logprobs

ENGINE_S = 0.6
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "it",
    "rains",
    "in",
    "the",
    "hills",
]
PROMPT_WORDS, TURN_WORDS, ANSWER_WORDS = 1500, 150, 55


class Counting(ScriptedEngine):
    """Says which turn of its conversation it is, and some words."""

    def __init__(self) -> None:
        template = hermes_template()
        rng = random.Random(3)
        self.answers = [
            [*template.encode(f"turn {turn} " + " ".join(rng.choices(WORDS, k=ANSWER_WORDS))),
             template.end_id]
            for turn in range(200)
        ]  # fmt: skip
        self.values = [logprobs(ids) for ids in self.answers]
        super().__init__(lambda prompt_ids, sampling: self._next(prompt_ids), delay_s=ENGINE_S)

    def _next(self, prompt_ids: Sequence[int]) -> Generation:
        turn = self._turn_of(prompt_ids)
        ids = self.answers[turn]
        return Generation(ids, self.values[turn], "stop", prompt_tokens=len(prompt_ids))

    def _turn_of(self, prompt_ids: Sequence[int]) -> int:
        """The turns before: their runs are known by their first id."""
        assert isinstance(prompt_ids, PathIds)
        first = self.answers[0][0]
        return sum(run.ids[0] == first for run in prompt_ids.runs)


def serve(out: Path) -> None:
    """The gateway's process: until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = gateway_config_of(prompt_length=65536, response_length=65536)
    hermes_template().use_fast_encoder()  # as a model's own
    try:
        with live(out, engine=Counting(), config=config) as gateway:
            print(gateway.url, flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


@dataclass
class Seen:
    """What the client saw."""

    turns: int = 0
    lost: list[str] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    lag_p50_ms: list[float] = field(default_factory=list)
    lag_p99_ms: list[float] = field(default_factory=list)
    lag_max_ms: list[float] = field(default_factory=list)


async def session(
    http: aiohttp.ClientSession, url: str, number: int, rate: float, total: int, ends: float,
    seen: Seen,
) -> int:  # fmt: skip
    """One program: a turn each `total / rate` seconds. Returns how many it had."""
    rng = random.Random(number)
    loop = asyncio.get_running_loop()
    period_s = total / rate
    due = loop.time() + period_s * number / total
    await asyncio.sleep(due - loop.time())
    async with http.post(f"{url}/sessions", json={"task_id": f"s{number}"}) as answer:
        opened = await answer.json()
    headers = {
        "authorization": f"Bearer {opened['api_key']}",
        "content-type": "application/json",
    }
    # Each message is written once, so that the clients need little of the machine.
    system = {"role": "system", "content": " ".join(rng.choices(WORDS, k=PROMPT_WORDS))}
    messages = [orjson.dumps(system)]
    done = 0
    while max(due, loop.time()) < ends:
        await asyncio.sleep(max(0.0, due - loop.time()))
        user = {"role": "user", "content": " ".join(rng.choices(WORDS, k=TURN_WORDS))}
        messages.append(orjson.dumps(user))
        body = b'{"model": "m", "messages": [%b]}' % b",".join(messages)
        begun = loop.time()
        async with http.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
            found = orjson.loads(await answer.read())
            content = found["choices"][0]["message"]["content"] if answer.status == 200 else ""
        if not content.startswith(f"turn {done} "):
            seen.lost.append(f"s{number} turn {done}: {answer.status} {content[:40]!r}")
            return done
        seen.late_s.append(loop.time() - begun - ENGINE_S)
        messages.append(orjson.dumps(found["choices"][0]["message"]))
        done += 1
        seen.turns += 1
        due += period_s
    async with http.post(f"{url}/sessions/{opened['id']}/finish", json={"reward": 1}) as answer:
        if answer.status != 200:
            seen.lost.append(f"s{number}: finish {answer.status}")
        await answer.read()
    return done


async def watch(
    http: aiohttp.ClientSession, url: str, pid: int, seen: Seen, rss: list[int]
) -> None:
    """Reads the gateway's own figures until it is cancelled."""
    while True:
        await asyncio.sleep(10)
        rss.append(rss_bytes(pid))
        async with http.get(f"{url}/health") as answer:
            lag = (await answer.json())["loop_lag_ms"]
        seen.lag_p50_ms.append(lag["p50"])
        seen.lag_p99_ms.append(lag["p99"])
        seen.lag_max_ms.append(lag["max"])


async def idle_lag(seconds: float) -> dict[str, float]:
    """The lag of a loop that does nothing, as the gateway measures its own."""
    lag = LoopLag(deque(maxlen=None))
    lag.start()
    await asyncio.sleep(seconds)
    lag.stop()
    return lag.figures()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(url: str, pid: int, sessions: int, rate: float, seconds: float) -> dict[str, Any]:
    """Runs all sessions; returns the figures."""
    seen, rss = Seen(), [rss_bytes(pid)]
    before = cpu_s(pid)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        watching = asyncio.create_task(watch(http, url, pid, seen, rss))
        started = asyncio.get_running_loop().time()
        ends = started + seconds
        each = await asyncio.gather(
            *(session(http, url, k, rate, sessions, ends, seen) for k in range(sessions))
        )
        wall_s = asyncio.get_running_loop().time() - started
        watching.cancel()
    late = sorted(seen.late_s) or [0.0]
    return {
        "sessions": sessions,
        "turns": seen.turns,
        "turns_per_s": round(seen.turns / wall_s, 1),
        "lost": len(seen.lost),
        "first_lost": seen.lost[:3],
        "gateway_cpu_ms_per_turn": round(1e3 * (cpu_s(pid) - before) / max(1, seen.turns), 2),
        "loop_lag_p50_ms": statistics.median(seen.lag_p50_ms or [0.0]),
        "loop_lag_p99_ms_median_and_max": [
            statistics.median(seen.lag_p99_ms or [0.0]),
            max(seen.lag_p99_ms or [0.0]),
        ],
        "loop_lag_max_ms": max(seen.lag_max_ms or [0.0]),
        "beyond_the_engine_s_p50_p99": [
            round(late[len(late) // 2], 3),
            round(late[len(late) * 99 // 100], 3),
        ],
        "memory_mb_per_session": round((max(rss) - rss[0]) / sessions / 1e6, 3),
        "turns_of_each": each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="turns a second, all sessions")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.idle:
        print(json.dumps(asyncio.run(idle_lag(asked.seconds))))
        return
    if asked.serve:
        serve(asked.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        gateway = _this("--serve", str(out))
        idle = _this("--idle", "--seconds", str(asked.seconds))
        assert gateway.stdout
        assert idle.stdout
        url = gateway.stdout.readline().strip()
        work = load(url, gateway.pid, asked.sessions, asked.rate, asked.seconds)
        found = asyncio.run(work)
        gateway.terminate()
        gateway.wait(120)
        found["loop_lag_ms_of_an_idle_process"] = json.loads(idle.stdout.read())
        found["wrong_records"] = wrong_records(out, found.pop("turns_of_each"))
    found["load_average"] = os.getloadavg()
    print(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), json.dumps(found, indent=1))


def _this(*arguments: str) -> subprocess.Popen[str]:
    """This module in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench.gateway", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def wrong_records(out: Path, turns_of_each: Sequence[int]) -> int:
    """Sessions whose record does not have exactly their turns in one sequence."""
    right = 0
    with (out / "trajectories.jsonl").open() as lines:
        for line in lines:
            record = json.loads(line)
            expected = turns_of_each[int(record["task_id"][1:])]
            right += len(record["turns"]) == expected and record["branches"] == []
    return len(turns_of_each) - right


if __name__ == "__main__":
    main()
