"""The embedded search server over 100,000 documents: making the index, one query at a time, many
clients at a time.

python -m tests.bench.search [DOCUMENTS]

The documents are made on the spot, of words as frequent as words are (Zipf), so that a query meets
the long lists that common words have. The clients are bare sockets: what is measured is the server;
a call of the tool has a row of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.row import Row
from tools.registry import load_tools
from tools.search import SearchTool
from tools.servers import embedded
from tools.servers.search.corpus import JsonlCorpus
from tools.servers.search.index import build_index

DOCUMENTS = 100_000
VOCABULARY = 50_000
DOCUMENT_WORDS = (60, 140)
QUERY_WORDS = (4, 9)
P50_LIMIT_MS = 2.0


def rows(*, quick: bool, documents: int = DOCUMENTS) -> list[Row]:
    """Index time and size, latency one query at a time, throughput with 8 and 32 clients, and a
    call of the tool.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus, index = Path(folder, "corpus.jsonl"), Path(folder, "index")
        _write_corpus(corpus, documents)
        started = time.perf_counter()
        build_index(JsonlCorpus(corpus), index)
        build_s = time.perf_counter() - started
        size = sum(file.stat().st_size for file in index.iterdir())
        made = f"{documents} documents, {corpus.stat().st_size / 2**20:.0f} MiB"
        return [
            Row("search_build_s", [build_s], note=made),
            Row("search_index_mib", [size / 2**20], note="the documents themselves included"),
            *asyncio.run(_measure(index, 200 if quick else 2000)),
        ]


async def _measure(index: Path, requests: int) -> list[Row]:
    server = embedded.search_over(str(index))
    server.acquire()
    try:
        port = urlsplit(await asyncio.to_thread(server.url)).port or 0
        await _client(port, _queries(requests // 10, seed=1))  # warms caches and files
        alone = await _client(port, _queries(requests))
        return [
            Row(
                "search_p50_ms",
                [statistics.median(alone)],
                limit=P50_LIMIT_MS,
                note="/retrieve, topk 3, one at a time, through HTTP",
            ),
            Row("search_p95_ms", [statistics.quantiles(alone, n=20)[-1]]),
            *[
                Row(
                    "search_per_s",
                    [await _throughput(port, requests, clients)],
                    case=f"{clients} clients",
                )
                for clients in (8, 32)
            ],
            Row(
                "search_call_p50_ms",
                [await _call_ms(index, requests // 4)],
                note="the same as a call of SearchTool",
            ),
        ]
    finally:
        server.release()


async def _throughput(port: int, requests: int, clients: int) -> float:
    """Queries a second, all clients together."""
    shares = [_queries(requests // clients, seed=client) for client in range(clients)]
    started = time.perf_counter()
    await asyncio.gather(*(_client(port, share) for share in shares))
    return sum(map(len, shares)) / (time.perf_counter() - started)


async def _client(port: int, queries: list[str]) -> list[float]:
    """Asks over one connection; the milliseconds that each answer took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took_ms = []
    for query in queries:
        body = json.dumps({"queries": [query], "topk": 3, "return_scores": True}).encode()
        head = f"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await _answer(reader)
        took_ms.append(1e3 * (time.perf_counter() - started))
        if len(json.loads(answer)["result"][0]) != 3:
            raise RuntimeError(f"the search server answered {answer[:200]!r}")
    writer.close()
    await writer.wait_closed()
    return took_ms


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


async def _call_ms(index: Path, calls: int) -> float:
    tool = SearchTool({"corpus": str(index)}, load_tools("search").schemas[0])
    took_ms = []
    for query in _queries(calls):
        started = time.perf_counter()
        await tool.execute("bench", {"query_list": [query]})
        took_ms.append(1e3 * (time.perf_counter() - started))
    await tool.close()
    return statistics.median(took_ms)


def _write_corpus(path: Path, documents: int) -> None:
    rng = random.Random(0)
    stream = _zipf(rng)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            words = list(itertools.islice(stream, rng.randint(*DOCUMENT_WORDS)))
            contents = f'"{" ".join(words[:3])}"\n{" ".join(words[3:])}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")


def _queries(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = _zipf(rng)
    return [" ".join(itertools.islice(words, rng.randint(*QUERY_WORDS))) for _ in range(count)]


def _zipf(rng: random.Random) -> Iterator[str]:
    """Words without end, the n-th most frequent one n times as rare as the first (Zipf, 1949)."""
    spelling = random.Random(0)  # the same words for everybody
    words = [
        "".join(spelling.choice(_SYLLABLES) for _ in range(spelling.randint(1, 4)))
        for _ in range(VOCABULARY)
    ]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    while True:
        yield from rng.choices(words, cum_weights=weights, k=10_000)


_SYLLABLES = [consonant + vowel for consonant in "bcdfghklmnprstvw" for vowel in "aeiou"]


def main() -> None:
    found = rows(quick=False, documents=int(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENTS)
    for row in found:
        print(*filter(None, row.cells()), sep="  ")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
