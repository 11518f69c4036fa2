"""SGLang's native HTTP API for tests: a server in this process that does as it is told, and
SGLang's own as a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from agent.engines.arguments import start_variables
from agent.engines.cpu_guards import guard_paths
from tests.helpers import ROOT

Behaviour = Callable[["Server", dict[str, Any]], Awaitable[Response]]


class Server:
    """Speaks SGLang's native API on a free port: each `/generate` takes the next behaviour, the
    last one for ever.

    `says` has answers to GET that are others than a server's own, by path. One that `hangs` takes
    connections, and no more.
    """

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.got_one = asyncio.Event()
        self.release = asyncio.Event()
        self.waiting: dict[str, asyncio.Event] = {}
        self.url = ""
        self.up = True
        self.hangs = False
        self.model = "/models/m"
        self.weights = "default"
        self.says: dict[str, Response] = {}

    async def generate(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.requests.append(request)
        self.got_one.set()
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        return await behaviour(self, self.bodies[-1])

    async def abort(self, request: Request) -> Response:
        self.aborted.append((await request.json())["rid"])
        if waiting := self.waiting.get(self.aborted[-1]):
            waiting.set()
        return Response(status_code=200)

    async def told(self, request: Request) -> Response:
        """`/health`, `/get_server_info` and what else may be asked for."""
        path = request.url.path
        if self.hangs:
            await self.release.wait()
        if path in self.says:
            return self.says[path]
        if path == "/health":
            return Response(status_code=200 if self.up else 503)
        if path == "/get_server_info":
            told = {
                "model_path": self.model,
                "version": "9.9",
                "dtype": "auto",
                "weight_version": self.weights,
                "api_key": "secret",
            }
            return JSONResponse(told)
        return Response(status_code=405 if path == "/generate" else 404)


def app(server: Server) -> Starlette:
    """The server's HTTP routes."""
    return Starlette(
        routes=[
            Route("/generate", server.generate, methods=["POST"]),
            Route("/abort_request", server.abort, methods=["POST"]),
            Route("/{path:path}", server.told),
        ]
    )


@contextlib.asynccontextmanager
async def serving(server: Server, **options: Any) -> AsyncIterator[Server]:
    """The server on a free port; `options` are uvicorn's."""
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(app(server), port=0, log_level="critical", lifespan="off", **options)
    )
    running = asyncio.create_task(uvicorn_server._serve())
    while not uvicorn_server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    scheme = "https" if options else "http"
    server.url = f"{scheme}://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        server.release.set()
        uvicorn_server.should_exit = True
        await running


@contextlib.contextmanager
def in_a_thread(server: Server) -> Iterator[Server]:
    """The server on a loop of its own: a run takes the main thread, for its signals."""
    loop, ended, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with serving(server):
            started.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(20)
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


async def answers(server: Server, body: dict[str, Any]) -> Response:
    meta = {
        "id": body["rid"],
        "finish_reason": {"type": "stop"},
        "prompt_tokens": len(body["input_ids"]),
        "cached_tokens": 0,
    }
    return JSONResponse(
        {
            "output_ids": [5, 2],
            "meta_info": {**meta, "output_token_logprobs": [[-0.25, 5, None], [-1.5, 2, None]]},
        }
    )


async def waits(server: Server, body: dict[str, Any]) -> Response:
    """Until it is aborted, or the server ends."""
    server.waiting[body["rid"]] = aborted = asyncio.Event()
    await asyncio.wait(
        [asyncio.create_task(event.wait()) for event in (aborted, server.release)],
        return_when=asyncio.FIRST_COMPLETED,
    )
    meta = {
        "finish_reason": {"type": "abort", "message": "aborted"},
        "output_token_logprobs": [[-0.25, 5, None]],
    }
    return JSONResponse({"output_ids": [5], "meta_info": meta})


async def breaks(server: Server, body: dict[str, Any]) -> Response:
    """Ends the connection in the midst of the answer."""
    return StreamingResponse(_cut_off(), headers={"content-length": "1000"})


async def _cut_off() -> AsyncIterator[bytes]:
    yield b"{"
    raise ConnectionResetError


def status(code: int, body: Any, **headers: str) -> Behaviour:
    async def behaviour(server: Server, request: dict[str, Any]) -> Response:
        return (
            PlainTextResponse(body, code, headers)
            if isinstance(body, str)
            else JSONResponse(body, code, headers)
        )

    return behaviour


# ---------------------------------------------------------------------- SGLang's own server


@dataclass
class Launched:
    """A running `sglang.launch_server` of its own process group."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """`kill -9` of all of it, as a machine that goes away."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def launched(model: Path, port: int, log: Path, **options: Any) -> Iterator[Launched]:
    """`python -m sglang.launch_server` on CPU, healthy."""
    server = launch(model, port, log, **options)
    try:
        wait_for_health(server, log)
        yield server
    finally:
        server.kill()


def launch(model: Path, port: int, log: Path, **options: Any) -> Launched:
    environ = {
        **os.environ,
        **start_variables(cuda=False),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *guard_paths(), *_given_paths()]),
    }
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        *_arguments({"model-path": model, "port": port, **options}),
    ]
    with log.open("a") as output:
        process = subprocess.Popen(
            command, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    return Launched(f"http://127.0.0.1:{port}", process)


def _given_paths() -> list[str]:
    """Of an environment of another version, if the tests run in one."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _arguments(given: dict[str, Any]) -> list[str]:
    shape = {
        "device": "cpu",
        "dtype": "bfloat16",
        "max-total-tokens": 8192,
        "max-running-requests": 4,
        "mem-fraction-static": 0.3,
    }
    backends = {"attention-backend": "torch_native", "sampling-backend": "pytorch"}
    flags = [
        "disable-overlap-schedule",
        "disable-cuda-graph",
        "skip-tokenizer-init",
        "skip-server-warmup",
        "sleep-on-idle",
    ]
    named = {**shape, **backends, **given}
    return [
        *(part for key, value in named.items() for part in (f"--{key}", str(value))),
        *(f"--{flag}" for flag in flags),
    ]


def wait_for_health(server: Launched, log: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=2).status_code == 200:
                return
        try:
            server.process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"no server: {log.read_text()[-2000:]}")


async def healthy(url: str) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(120):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


def free_port() -> int:
    """A port that nobody has, and that nobody gets who asks for any; one that a server is started
    on again and again cannot be 0.
    """
    while True:
        port = random.SystemRandom().randrange(
            20_000, 30_000
        )  # Linux gives out those from 32768 on
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
