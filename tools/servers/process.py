"""A server as a process: announces its port in one line of JSON, serves, ends in good order when it is told or left alone.

When it answers, it has written one line to stdout: {"port": ..., and what else it says of itself}, or {"error": ...} and
it ends with code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

import uvicorn
from starlette.types import ASGIApp

_PARENT_CHECK_S = 1.0
_OPEN_FILES = 65_536
_UVICORN: dict[str, Any] = {
    "lifespan": "off",
    "access_log": False,
    "log_level": "warning",
    "timeout_graceful_shutdown": 5,
    "timeout_keep_alive": 60,  # longer than clients keep an idle connection: a request that meets our closing it is lost
}


def serve_until_ended(
    app: ASGIApp, host: str, port: int, says: dict[str, Any], *, with_parent: bool = False
) -> None:
    """Serves until SIGTERM, SIGINT or, `with_parent`, the end of the parent; then the process ends with code 0.

    `says` follows the port in the line that announces it. Raises OSError (a port in use) before anything is served.
    """
    end_quietly_on_signals()
    asyncio.run(serve(app, host, port, says, with_parent=with_parent))


def end_quietly_on_signals() -> None:
    """SIGTERM and SIGINT end this process with code 0, in good order: what is half-made is cleaned up on the way out."""
    # uvicorn ends in good order and then raises the signal again, which would end us as if it had not.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def announce(**says: Any) -> None:
    """Writes the line that a parent or a user waits for."""
    print(json.dumps(says), flush=True)


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    says: dict[str, Any],
    *,
    with_parent: bool = False,
    stopping: asyncio.Event | None = None,
) -> None:
    """`serve_until_ended` as a coroutine. `stopping` is set when the server is about to wait for running requests."""
    _allow_many_files()
    with socket.create_server((host, port), backlog=1024) as listener:
        # asyncio sets this only on sockets made with an explicit protocol; without it every answer waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = _Server(uvicorn.Config(app, **_UVICORN), stopping or asyncio.Event())
        watch = asyncio.ensure_future(_end_with_parent(server)) if with_parent else None
        announce(port=listener.getsockname()[1], **says)
        await server.serve([listener])
        if watch:
            watch.cancel()


def _allow_many_files() -> None:
    """Connections, and a sandbox's sessions, are many; what a shell allows by default, 1,024, is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)


async def _end_with_parent(server: uvicorn.Server) -> None:
    """Ends the server when stdin ends, or (another child of the parent may hold the pipe open) the parent is another."""
    loop, parent, ended = asyncio.get_running_loop(), os.getppid(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _PARENT_CHECK_S)
    server.should_exit = True
