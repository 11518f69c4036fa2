"""The embedded sandbox server: `print(1)` through HTTP, one client at a time and eight, warm and
cold.

python -m tests.bench.sandbox [REQUESTS]

The clients are bare sockets: what is measured is the server and the start of a program. The real
SandboxFusion's figures stand beside ours as the peer's; they were measured on another day, on a
machine like this one, without isolation (`none`), and so they are constants here.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.bench.row import Row
from tools.servers.embedded import EmbeddedServer

CLIENTS = 8
P50_LIMIT_MS = 8.0
PEER = "SandboxFusion, no isolation, measured elsewhere"
PEER_P50_MS, PEER_P95_MS, PEER_PER_S = 38.0, 77.0, 23.0
PEER_ISOLATED = "SandboxFusion, lite, measured elsewhere"
PEER_ISOLATED_P50_MS, PEER_ISOLATED_PER_S = 460.0, 2.0

_PROGRAM = {"code": "print(1)", "language": "python"}


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds of each request by one client, of each call in a session, and requests per
    second with all clients.
    """

    alone_ms: list[float]
    session_ms: list[float]
    per_s: float

    @property
    def p95_ms(self) -> float:
        return statistics.quantiles(self.alone_ms, n=20)[-1]


def rows(*, quick: bool) -> list[Row]:
    """Latency and throughput, warm, cold and in a session. Raises SandboxUnavailable."""
    requests = 48 if quick else 400
    warm, cold = (asyncio.run(_measure(requests, *arguments)) for arguments in ((), ("--cold",)))
    return [
        Row(
            "sandbox_p50_ms",
            warm.alone_ms,
            peer=[PEER_P50_MS],
            peer_name=PEER,
            limit=P50_LIMIT_MS,
            note="print(1) through HTTP, warm",
        ),
        Row("sandbox_p95_ms", [warm.p95_ms], peer=[PEER_P95_MS], peer_name=PEER),
        Row(
            "sandbox_per_s",
            [warm.per_s],
            peer=[PEER_PER_S],
            peer_name=PEER,
            note=f"{CLIENTS} clients; 230 are 10 times the peer's",
        ),
        Row(
            "sandbox_cold_p50_ms",
            cold.alone_ms,
            peer=[PEER_ISOLATED_P50_MS],
            peer_name=PEER_ISOLATED,
            note="a bubblewrap each",
        ),
        Row(
            "sandbox_cold_per_s", [cold.per_s], peer=[PEER_ISOLATED_PER_S], peer_name=PEER_ISOLATED
        ),
        Row("sandbox_session_p50_ms", warm.session_ms, note="a call in a session"),
    ]


async def _measure(requests: int, *arguments: str) -> Figures:
    server = EmbeddedServer("tools.servers.sandbox", *arguments)
    server.acquire()
    try:
        port = urlsplit(await asyncio.to_thread(server.url)).port or 0
        await _run_many(port, 10)
        alone_ms = await _run_many(port, requests)
        started = time.perf_counter()
        await asyncio.gather(*(_run_many(port, requests // CLIENTS) for _ in range(CLIENTS)))
        per_s = requests // CLIENTS * CLIENTS / (time.perf_counter() - started)
        return Figures(alone_ms, await _run_many(port, requests // 4, in_session=True), per_s)
    finally:
        server.release()


async def _run_many(port: int, count: int, *, in_session: bool = False) -> list[float]:
    """Milliseconds of each of so many requests, one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path, took_ms = "/run_code", []
    if in_session:
        path = f"/v1/sessions/{(await _post(reader, writer, '/v1/sessions', {}))['id']}/run_code"
    for _ in range(count):
        started = time.perf_counter()
        answer = await _post(reader, writer, path, _PROGRAM)
        took_ms.append(1e3 * (time.perf_counter() - started))
        if answer["run_result"]["stdout"] != "1\n":
            raise RuntimeError(f"the sandbox answered {answer}")
    writer.close()
    return took_ms


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]
) -> dict[str, Any]:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: sandbox\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(headers.split("content-length:")[1].split("\r\n")[0])
    return json.loads(await reader.readexactly(length))  # type: ignore[no-any-return]


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    for arguments in ((), ("--cold",)):
        figures = asyncio.run(_measure(requests, *arguments))
        found = {
            "p50_ms": statistics.median(figures.alone_ms),
            "p95_ms": figures.p95_ms,
            "per_s": figures.per_s,
        }
        found["session_p50_ms"] = statistics.median(figures.session_ms)
        load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(arguments or "warm", {name: round(value, 1) for name, value in found.items()}, load)


if __name__ == "__main__":
    main()
