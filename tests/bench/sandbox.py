"""Latency and throughput of the embedded sandbox server, measured from a client through HTTP.

    python tests/bench/sandbox.py [REQUESTS]

Nothing here is asserted: figures belong to a machine and its load.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from typing import Any

import httpx

from tools.servers import embedded


async def measure(requests: int = 100, clients: int = 8) -> dict[str, Any]:
    """`print(1)`: p50 and p95 one at a time in ms, and requests per second with `clients` at once."""
    embedded.sandbox.acquire()
    try:
        url = await asyncio.to_thread(embedded.sandbox.url)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await _run(client)
            alone = [await _run(client) for _ in range(requests)]
            started = time.perf_counter()
            await asyncio.gather(*(_run_many(client, requests // clients) for _ in range(clients)))
            together_s = time.perf_counter() - started
            return {
                "sandbox_p50_ms": round(1e3 * statistics.median(alone), 1),
                "sandbox_p95_ms": round(1e3 * statistics.quantiles(alone, n=20)[-1], 1),
                "sandbox_per_s": round(clients * (requests // clients) / together_s, 1),
            }
    finally:
        embedded.sandbox.release()


async def _run_many(client: httpx.AsyncClient, count: int) -> None:
    for _ in range(count):
        await _run(client)


async def _run(client: httpx.AsyncClient) -> float:
    started = time.perf_counter()
    answer = await client.post("/run_code", json={"code": "print(1)", "language": "python"})
    took_s = time.perf_counter() - started
    if answer.json()["run_result"]["stdout"] != "1\n":
        raise RuntimeError(f"the sandbox answered {answer.text}")
    return took_s


if __name__ == "__main__":
    figures = asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
    print(json.dumps({**figures, "cores": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 1)}))
