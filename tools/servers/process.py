"""A server as a process: it announces its port, serves, and ends cleanly on a signal.

Before it serves, it writes one line of JSON to stdout: {"port": ...} with other facts about itself.
If it cannot serve, the line is {"error": ...} and the process ends with code 1.
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
    # Longer than clients keep an idle connection: a request sent while it closes is lost.
    "timeout_keep_alive": 60,
}


def serve_until_ended(
    app: ASGIApp, host: str, port: int, says: dict[str, Any], *, with_parent: bool = False
) -> None:
    """Serves until SIGTERM, SIGINT or, `with_parent`, the end of the parent; then exits with 0.

    `says` follows the port in the announcement. Raises OSError (a port in use) before it serves.
    """
    end_quietly_on_signals()
    asyncio.run(serve_app(app, host, port, says, with_parent=with_parent))


def end_quietly_on_signals() -> None:
    """Makes SIGTERM and SIGINT end this process with code 0, after its clean-up."""
    # uvicorn ends cleanly and then raises the signal again, which by default ends with a signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def announce(**says: Any) -> None:
    """Writes the line that the parent or the user waits for."""
    print(json.dumps(says), flush=True)


async def serve_app(
    app: ASGIApp,
    host: str,
    port: int,
    says: dict[str, Any],
    *,
    with_parent: bool = False,
    stopping: asyncio.Event | None = None,
) -> None:
    """`serve_until_ended` as a coroutine.

    stopping: set when the server begins to wait for running requests
    """
    _allow_many_files()
    with socket.create_server((host, port), backlog=1024) as listener:
        # asyncio sets this only on sockets made with an explicit protocol. Without it every answer
        # waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = _Server(uvicorn.Config(app, **_UVICORN), stopping or asyncio.Event())
        watch = asyncio.ensure_future(_end_with_parent(server)) if with_parent else None
        announce(port=listener.getsockname()[1], **says)
        await server.serve([listener])
        if watch:
            watch.cancel()


def _allow_many_files() -> None:
    """Raises the limit of open files, 1,024 by default: connections and sessions are many."""
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
    """Ends the server when stdin ends or the parent changes.

    Another child of the parent may hold the pipe open, so stdin alone is not enough.
    """
    loop, parent, ended = asyncio.get_running_loop(), os.getppid(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _PARENT_CHECK_S)
    server.should_exit = True
