"""CPU of a tool's call over HTTP with many beside it, by our connections and by httpx's own pool.

The server is another process and answers every call after a while, so that all calls of a round are
in the air at once; what is counted is the client's CPU alone.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time

import httpx

from tests.bench.row import Row
from tools.transport import AiohttpTransport

CALLS = (16, 256)
ROUNDS = 4
BODY = b'{"code": "print(1)", "language": "python"}'
NAP_S = 0.3

_SERVER = f"""
import asyncio, socket, uvicorn

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep({NAP_S})
    headers = [(b"content-length", b"2")]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": b"{{}}"}})

listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, lifespan="off", log_level="error", timeout_keep_alive=600)
uvicorn.Server(config).run([listening])
"""


def rows(*, quick: bool) -> list[Row]:
    """A row for each number of calls at once."""
    repeats = 2 if quick else 5
    with _server() as url:
        return [asyncio.run(_row(url, calls, repeats)) for calls in CALLS]


async def _row(url: str, calls: int, repeats: int) -> Row:
    limits = httpx.Limits(
        max_connections=calls, max_keepalive_connections=calls, keepalive_expiry=2.0
    )
    ours, peers = [], []
    async with (
        httpx.AsyncClient(
            transport=AiohttpTransport(connections=calls, keepalive_s=2.0), timeout=None
        ) as mine,
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(limits=limits), timeout=None) as pool,
    ):
        for _ in range(repeats + 1):
            ours.append(await _cpu_ms(mine, url, calls))
            peers.append(await _cpu_ms(pool, url, calls))
    ours, peers = ours[1:], peers[1:]  # the first round also connects
    return Row(
        "http_call_cpu_ms",
        ours,
        case=f"calls={calls}",
        peer=peers,
        peer_name="httpx's own pool",
        note="a tool's call over HTTP",
    )


async def _cpu_ms(client: httpx.AsyncClient, url: str, calls: int) -> float:
    """CPU ms of this process for one call, of so many at once."""

    async def conversation() -> None:
        for _ in range(ROUNDS):
            (await client.post(url, content=BODY)).raise_for_status()

    started = process_time()
    await asyncio.gather(*(conversation() for _ in range(calls)))
    return 1e3 * (process_time() - started) / (calls * ROUNDS)


@contextmanager
def _server() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()
