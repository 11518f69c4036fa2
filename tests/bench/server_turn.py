"""CPU of a turn's request to a server, ours beside a bare HTTP/1.1 client.

    python -m tests.bench.server_turn

The server is another process that answers every request after a while with 128 sampled tokens and
their log-probs, as SGLang writes them. What is counted is this process's CPU: `bare` is the ideal
loop of `tests.bench.gpu`, which writes and reads HTTP itself; `ours` is `SGLangServerEngine`, which
also checks the answer, watches the server and can send the turn again.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

from agent.engines.servers import SGLangServerEngine
from tests.bench.gpu.server import BareHttp

AT_ONCE = (64, 256)
ROUNDS, TURNS = 5, 4
PROMPT = 512
SAMPLING = {"temperature": 1.0, "max_new_tokens": 128, "ignore_eos": True}

_SERVER = """
import asyncio, json

ids = list(range(1000, 1128))
meta = {"id": "x", "finish_reason": {"type": "length", "length": 128}, "prompt_tokens": PROMPT,
        "weight_version": "default", "total_retractions": 0, "completion_tokens": 128,
        "cached_tokens": 400, "e2e_latency": 0.31234,
        "output_token_logprobs": [[-1.2345678901234567, one, None] for one in ids]}
body = json.dumps({"output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()
head = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: "
answer = head + str(len(body)).encode() + b"\\r\\n\\r\\n" + body

async def serve(reader, writer):
    try:
        while True:
            asked = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            size = int(asked.split(b"content-length:")[1].split(b"\\r\\n")[0])
            await reader.readexactly(size)
            await asyncio.sleep(0.3)
            writer.write(answer)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
""".replace("PROMPT", str(PROMPT))

Ask = Callable[[list[int]], Awaitable[Any]]


def main() -> None:
    with _server() as url:
        for at_once in AT_ONCE:
            bare, ours = asyncio.run(_measured(url, at_once))
            print(
                f"{at_once} at once, CPU ms a turn: bare {_shown(bare)}, ours {_shown(ours)}, "
                f"ratio of the best {min(ours) / min(bare):.2f}",
                flush=True,
            )


def _shown(rounds: list[float]) -> str:
    return f"{min(rounds):.3f} (rounds: {' '.join(f'{one:.3f}' for one in rounds)})"


async def _measured(url: str, at_once: int) -> tuple[list[float], list[float]]:
    """CPU ms a turn of each round, bare and ours taking turns; the first round connects."""
    bare, engine = BareHttp(url), SGLangServerEngine([url], max_connections=at_once)

    async def ask(ids: list[int]) -> Any:
        return await engine.generate(ids, SAMPLING, request_id=uuid.uuid4().hex)

    found: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS + 1):
        found[0].append(await _round(lambda ids: bare.ask(ids, SAMPLING), at_once))
        found[1].append(await _round(ask, at_once))
    bare.close()
    await engine.close()
    return found[0][1:], found[1][1:]


async def _round(ask: Ask, at_once: int) -> float:
    async def conversation(number: int) -> None:
        ids = list(range(number, number + PROMPT))
        for _ in range(TURNS):
            await ask(ids)

    started = process_time()
    await asyncio.gather(*(conversation(number) for number in range(at_once)))
    return 1e3 * (process_time() - started) / (at_once * TURNS)


@contextmanager
def _server() -> Iterator[str]:
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
