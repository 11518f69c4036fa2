"""The sandbox server as a process: SandboxFusion's `POST /run_code` and `GET /v1/ping`, and sessions of our own.

When it answers, it has written one line of JSON to stdout: {"port": ...}, or {"error": ...} and it ends with code 1.
What the machine lacks, it says once, on stderr. A client that hangs up ends its program, and so does SIGTERM, which
answers 503; then nothing is left of any program.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass

from tools.servers.process import end_quietly_on_signals, serve
from tools.servers.sandbox.app import make_app
from tools.servers.sandbox.probe import working_sandbox
from tools.servers.sandbox.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Options:
    """`workers`: programs at a time, None is one a CPU. `packages`: installed ones that programs see. `cold`: no zygote.

    At most `sessions` are kept at a time, and each ends when nobody has called for `session_idle_s`.
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
    """Probes, announces the port, and serves until SIGTERM, SIGINT or, `with_parent`, the end of the parent.

    Raises ToolsError and OSError (a port in use) before anything is served.
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
        app = make_app(working, sessions, options.workers or os.cpu_count() or 1, stopping)
        await serve(
            app, options.host, options.port, {}, with_parent=options.with_parent, stopping=stopping
        )


def serve_until_ended(options: Options) -> None:
    """`serve_sandbox` as a whole process: SIGTERM and SIGINT end it in good order, with code 0."""
    end_quietly_on_signals()
    asyncio.run(serve_sandbox(options))


def names(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(filter(None, (name.strip() for name in listed.split(","))))
