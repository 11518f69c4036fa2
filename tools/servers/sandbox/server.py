"""The sandbox server as a process: SandboxFusion's routes, and sessions of our own.

It announces {"port": ...} on stdout, or {"error": ...} and ends with code 1; on stderr it says once
what the machine lacks. If a client hangs up, its program is ended. SIGTERM ends all programs, with
503 for the answer. Nothing is left of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass

from tools.servers.process import end_quietly_on_signals, serve_app
from tools.servers.sandbox.app import sandbox_app
from tools.servers.sandbox.probe import working_sandbox
from tools.servers.sandbox.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the server.

    workers: programs at a time; None: one for each CPU
    packages: installed ones that programs may import
    sessions: at a time, at most
    session_idle_s: after which a session without calls ends
    cold: without a zygote
    with_parent: ends with the parent process
    """

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int | None = None
    packages: tuple[str, ...] = ()
    sessions: int = 1024
    session_idle_s: float = 900
    cold: bool = False
    with_parent: bool = False


async def serve_sandbox(options: Options) -> None:
    """Probes, announces the port, and serves until a signal or, `with_parent`, the parent's end.

    Raises ToolsError and OSError (a port in use) before it serves.
    """
    stopping = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        working = await working_sandbox(options.packages, cold=options.cold)
        stack.push_async_callback(working.sandbox.groups.close)
        stack.push_async_callback(working.sandbox.launcher.close)
        for note in working.notes:
            print(f"note: sandbox: {note}", file=sys.stderr, flush=True)
        sessions = Sessions(working.sandbox, options.sessions, options.session_idle_s)
        stack.push_async_callback(sessions.close)
        app = sandbox_app(working, sessions, options.workers or os.cpu_count() or 1, stopping)
        await serve_app(
            app, options.host, options.port, {}, with_parent=options.with_parent, stopping=stopping
        )


def run_sandbox_server(options: Options) -> None:
    """`serve_sandbox` as a process: SIGTERM and SIGINT end it cleanly, with code 0."""
    end_quietly_on_signals()
    asyncio.run(serve_sandbox(options))


def package_names(listed: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(filter(None, (name.strip() for name in listed.split(","))))
