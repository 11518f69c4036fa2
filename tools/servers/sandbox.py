"""The sandbox server as a process: SandboxFusion's `POST /run_code` and `GET /v1/ping`, and sessions of our own.

    python -m tools.servers.sandbox [--host 127.0.0.1] [--port 8080] [--workers N] [--packages numpy,sympy]

When it answers, it has written one line of JSON to stdout: {"port": ...}, or {"error": ...} and it ends with code 1.
What the machine lacks, it says once, on stderr. A client that hangs up ends its program, and so does SIGTERM, which
answers 503; then nothing is left of any program.
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
from dataclasses import dataclass

import uvicorn

from tools.base import ToolsError
from tools.servers.probe import working_sandbox
from tools.servers.sandbox_app import make_app
from tools.servers.sessions import Sessions

_PARENT_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """`workers`: programs at a time, None is one a CPU. `packages`: installed ones that programs see. `cold`: no zygote.

    At most `sessions` are kept at a time, and each ends when nobody has called for `session_idle_s`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int | None = None
    packages: tuple[str, ...] = ()
    sessions: int = 256
    session_idle_s: float = 900
    cold: bool = False
    with_parent: bool = False


class _Server(uvicorn.Server):
    """uvicorn's, which tells the app that it is about to wait for running requests."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)


async def serve(options: Options) -> None:
    """Probes, announces the port, and serves until SIGTERM, SIGINT or, `with_parent`, the end of the parent.

    Raises ToolsError and OSError (a port in use) before anything is served.
    """
    stopping = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        working = await working_sandbox(options.packages, cold=options.cold)
        stack.push_async_callback(working.sandbox.launcher.close)
        for note in working.notes:
            print(f"note: sandbox: {note}", file=sys.stderr, flush=True)
        sessions = Sessions(working.sandbox, options.sessions, options.session_idle_s)
        stack.push_async_callback(sessions.close)
        listener = stack.enter_context(socket.create_server((options.host, options.port), backlog=1024))
        # asyncio sets this only on sockets made with an explicit protocol; without it every answer waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        app = make_app(working, sessions, options.workers or os.cpu_count() or 1, stopping)
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", http="h11", timeout_graceful_shutdown=5)
        server = _Server(config, stopping)
        if options.with_parent:
            stack.callback(asyncio.ensure_future(_end_with_parent(server)).cancel)
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        await server.serve([listener])


async def _end_with_parent(server: uvicorn.Server) -> None:
    """Ends the server when stdin ends, or (another child of the parent may hold the pipe open) the parent is another."""
    loop, parent, ended = asyncio.get_running_loop(), os.getppid(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _PARENT_CHECK_S)
    server.should_exit = True


def serve_until_ended(options: Options) -> None:
    """`serve` as a whole process: SIGTERM and SIGINT end it in good order, with code 0."""
    # uvicorn ends in good order and then raises the signal again, which would end us as if it had not.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    asyncio.run(serve(options))


def names(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(filter(None, (name.strip() for name in listed.split(","))))


def main() -> int:
    """The command. 0 after an orderly end, 1 where nothing could be served."""
    default = Options()
    parser = argparse.ArgumentParser(prog="tools.servers.sandbox", description="SandboxFusion's /run_code, isolated by bubblewrap.")
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=default.port, help="0 takes a free one")
    parser.add_argument("--workers", type=int, help="programs at a time; default: one a CPU")
    parser.add_argument("--packages", type=names, default=(), help="installed packages that programs see: numpy,sympy")
    parser.add_argument("--sessions", type=int, default=default.sessions, help="at most so many at a time")
    parser.add_argument("--session-idle-s", type=float, default=default.session_idle_s, help="a session ends when nobody calls for so long")
    parser.add_argument("--cold", action="store_true", help="a bubblewrap of its own for each program")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin ends or the parent does")
    try:
        serve_until_ended(Options(**vars(parser.parse_args())))
    except (ToolsError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
