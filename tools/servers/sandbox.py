"""The sandbox server: SandboxFusion's `POST /run_code` and `GET /v1/ping`, every program shut in by bubblewrap.

    python -m tools.servers.sandbox [--host 127.0.0.1] [--port 8080] [--workers N]

When it answers, it has written one line of JSON to stdout: {"port": ...}, or {"error": ...} and it ends with code 1.
It runs as many programs at a time as there are cores; the others wait their turn in order of arrival, and waiting does
not count against their time limit. A client that hangs up ends its program, and so does SIGTERM, which answers 503.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any

import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tools.base import SandboxUnavailable
from tools.servers.memory import MIB
from tools.servers.probe import Working, working_sandbox
from tools.servers.runner import run_code
from tools.servers.wire import RunCodeRequest, RunCodeResponse

MAX_REQUEST_BYTES = 64 * MIB
_PARENT_CHECK_S = 1.0


def make_app(working: Working, workers: int, stopping: asyncio.Event) -> Starlette:
    """The ASGI app that runs at most `workers` programs at a time, and ends them once `stopping` is set."""
    turn = asyncio.Semaphore(workers)

    async def run(request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return _refusal(413, "too_large", [], f"the request is over {MAX_REQUEST_BYTES // MIB} MiB")
        try:
            asked = RunCodeRequest.model_validate_json(body)
        except pydantic.ValidationError as error:
            return JSONResponse({"detail": [{**wrong, "loc": ["body", *wrong["loc"]]} for wrong in _problems(error)]}, 422)
        if asked.language not in working.languages:
            supported = ", ".join(working.languages)
            return _refusal(422, "enum", ["body", "language"], f"{asked.language!r} is not supported here; supported are {supported}")
        answer = await _unless(_in_turn(asked), _hung_up(request), stopping.wait())
        if answer is None:
            return _refusal(503, "stopped", [], "the server is being stopped")
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _in_turn(asked: RunCodeRequest) -> RunCodeResponse:
        async with turn:
            return await run_code(working.sandbox, working.languages[asked.language], asked)

    async def ping(_: Request) -> Response:
        return JSONResponse("pong")

    return Starlette(routes=[Route("/run_code", run, methods=["POST"]), Route("/v1/ping", ping)])


async def _body(request: Request) -> bytes | None:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            return None
    return bytes(body)


def _problems(error: pydantic.ValidationError) -> Any:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _refusal(code: int, kind: str, where: list[str], message: str) -> Response:
    return JSONResponse({"detail": [{"type": kind, "loc": where, "msg": message}]}, code)


async def _unless(running: Coroutine[Any, Any, RunCodeResponse], *ends: Coroutine[Any, Any, Any]) -> RunCodeResponse | None:
    """The result, or None where one of `ends` comes first: the program is then ended, for nobody waits for it."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(coroutine) for coroutine in (running, *ends)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    """uvicorn's, which tells the app that it is about to wait for running requests."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)


async def serve(host: str, port: int, workers: int, *, cold: bool, with_parent: bool) -> None:
    """Probes, announces the port, and serves until SIGTERM, SIGINT or, `with_parent`, the end of the parent.

    Raises SandboxUnavailable and OSError (a port in use) before anything is served.
    """
    stopping = asyncio.Event()
    working = await working_sandbox(cold=cold)
    for note in working.notes:
        print(f"note: sandbox: {note}", file=sys.stderr, flush=True)
    app = make_app(working, workers, stopping)
    with socket.create_server((host, port), backlog=1024) as listener:
        # asyncio sets this only on sockets made with an explicit protocol; without it every answer waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", http="h11", timeout_graceful_shutdown=5)
        server = _Server(config, stopping)
        watch = asyncio.ensure_future(_end_with_parent(server)) if with_parent else None
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        try:
            await server.serve([listener])
        finally:
            if watch:
                watch.cancel()
            await working.sandbox.launcher.close()


async def _end_with_parent(server: uvicorn.Server) -> None:
    """Ends the server when stdin ends, or (another child of the parent may hold the pipe open) the parent is another."""
    loop, parent, ended = asyncio.get_running_loop(), os.getppid(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _PARENT_CHECK_S)
    server.should_exit = True


def serve_until_ended(host: str, port: int, workers: int | None = None, *, cold: bool = False, with_parent: bool = False) -> None:
    """`serve` as a whole process: SIGTERM and SIGINT end it in good order, with code 0. `workers`: None is one a CPU."""
    # uvicorn ends in good order and then raises the signal again, which would end us as if it had not.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    asyncio.run(serve(host, port, workers or os.cpu_count() or 1, cold=cold, with_parent=with_parent))


def main() -> int:
    """The command. 0 after an orderly end, 1 where nothing could be served."""
    parser = argparse.ArgumentParser(prog="tools.servers.sandbox", description="SandboxFusion's /run_code, isolated by bubblewrap.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--workers", type=int, help="programs at a time; default: one a CPU")
    parser.add_argument("--cold", action="store_true", help="a bubblewrap of its own for each program")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin ends or the parent does")
    options = parser.parse_args()
    try:
        serve_until_ended(options.host, options.port, options.workers, cold=options.cold, with_parent=options.with_parent)
    except (SandboxUnavailable, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
