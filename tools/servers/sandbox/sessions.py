"""Python sessions: interpreters that keep variables from call to call, isolated like any program.

A session belongs to whoever knows its id. Between calls all of its processes are stopped. It ends
on request, when its process ends or exceeds a limit, when a call exceeds its time or is abandoned,
when there is no call for `idle_s`, and with the server. Then nothing of it is left, and its id is
unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from dataclasses import dataclass

from tools.servers.sandbox.descriptors import Streams, sealed_file
from tools.servers.sandbox.isolation import SESSION
from tools.servers.sandbox.languages import python
from tools.servers.sandbox.memory import Group
from tools.servers.sandbox.program import Program, Running, SandboxError
from tools.servers.sandbox.runner import Cut, ProgramResult, Sandbox, watched

_CPU_S = 3600  # of each process of a session, over all calls
_START_S = 20.0
_ANSWER_BYTES = 16


class TooManySessions(Exception):  # noqa: N818 - an answer, not a fault
    """The server has as many sessions as it may; the message says so."""


@dataclass(frozen=True, slots=True)
class SessionResult:
    """The result of a call, and whether it was the session's last."""

    outcome: ProgramResult
    memory_mib: int
    is_over: bool


class Sessions:
    """All of a server's sessions, by id; at most `most` at a time."""

    def __init__(self, sandbox: Sandbox, most: int, idle_s: float) -> None:
        self._sandbox = sandbox
        self._most = most
        self._idle_s = idle_s
        self._sessions: dict[str, _Session] = {}
        self._lives: set[asyncio.Task[None]] = set()

    async def start(self, memory_mib: int) -> str:
        """Starts a session. Returns its id. Raises TooManySessions, SandboxError, OSError."""
        if len(self._lives) >= self._most:
            raise TooManySessions(
                f"there are {self._most} sessions already, and no more are allowed at a time"
            )
        session = _Session(memory_mib, self._idle_s)
        life = asyncio.create_task(session.live(self._sandbox))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)
        name = secrets.token_hex(16)
        self._sessions[name] = session
        life.add_done_callback(lambda _: self._sessions.pop(name, None))
        await asyncio.shield(session.started)
        return name

    async def run(self, name: str, code: str, stdin: str, timeout_s: float) -> SessionResult | None:
        """Runs code in a session. Returns None if there is no such session.

        Cancelling it ends the session. Raises SandboxError, OSError.
        """
        session = self._sessions.get(name)
        return await session.run(code, stdin, timeout_s) if session else None

    async def end(self, name: str) -> bool:
        """Ends a session. Returns whether it existed."""
        session = self._sessions.pop(name, None)
        if session is None:
            return False
        session.end()
        await session.ended()
        return True

    async def close(self) -> None:
        """Ends all sessions."""
        for session in list(self._sessions.values()):
            session.end()
        if self._lives:
            await asyncio.wait(self._lives)


class _Session:
    """One session. `live` is its life, with all its resources; `run` is one call."""

    def __init__(self, memory_mib: int, idle_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = self._loop.create_future()
        self._gone = asyncio.Event()
        self._turn = asyncio.Lock()
        self._memory_mib = memory_mib
        self._idle_s = idle_s
        self._timer: asyncio.TimerHandle | None = None
        self._why: Cut | None = None
        self._is_ending = False
        self._running: Running | None = None
        self._exit_code: int | None = None
        self._error: SandboxError | None = None
        self._group = Group()
        self._kills = 0

    async def live(self, sandbox: Sandbox) -> None:
        try:
            async with sandbox.groups.group(self._memory_mib) as group:
                with contextlib.ExitStack() as stack:
                    await self._live(sandbox, group, stack)
        except (SandboxError, OSError) as error:
            self._error = SandboxError(str(error))
            if not self.started.done():
                self.started.set_exception(self._error)
        finally:
            self._gone.set()

    async def _live(self, sandbox: Sandbox, group: Group, stack: contextlib.ExitStack) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        stack.enter_context(self._socket)
        with theirs:
            self._streams = Streams(stack, theirs.fileno(), lambda: self.end("output"))
            program = Program((python(), SESSION), {}, (), _CPU_S, self._memory_mib)
            running = self._running = await sandbox.launcher.start(program, self._streams, group)
        stack.callback(running.close)
        self._streams.close_write_ends()
        self._group = group
        ended = asyncio.ensure_future(running.ended())
        try:
            async with watched(running, self._memory_mib, group, self.end):
                await self._ready(ended)
                self._exit_code = await asyncio.shield(ended)
        finally:
            self.end()
            await asyncio.wait([ended])
            await self._streams.end()
            if group.kills() > self._kills:
                self._why = self._why or "memory"

    async def _ready(self, ended: asyncio.Future[int | None]) -> None:
        """Waits until the interpreter listens. If it ends instead, raises what `ended` does."""
        async with asyncio.timeout(_START_S):
            if not await self._loop.sock_recv(self._socket, _ANSWER_BYTES):
                await ended
                raise SandboxError("the session's interpreter ended at its start")
        self._rest()
        self.started.set_result(None)

    async def run(self, code: str, stdin: str, timeout_s: float) -> SessionResult | None:
        """Runs a call. Returns None if the session has ended. Cancelling it ends the session."""
        async with self._turn:
            if self._is_ending:
                return None
            started = time.perf_counter()
            try:
                exit_code = await self._call(code, stdin, timeout_s)
            except BaseException:
                self.end()
                raise
            if exit_code is None:
                self.end()
                await self._gone.wait()
                if self._error is not None:
                    raise self._error
                exit_code = self._exit_code
            else:
                self._rest()
            cut, self._kills = self._why or self._killed_since(self._kills), self._group.kills()
            stdout, stderr = self._streams.stdout.take(), self._streams.stderr.take()
            outcome = ProgramResult(
                exit_code, stdout, stderr, time.perf_counter() - started, cut, {}
            )
            return SessionResult(outcome, self._memory_mib, self._is_ending)

    def _killed_since(self, kills: int) -> Cut | None:
        return "memory" if self._group.kills() > kills else None

    async def _call(self, code: str, stdin: str, timeout_s: float) -> int | None:
        """The exit code; None if the session has ended or must end."""
        self._wake()
        with contextlib.ExitStack() as stack:
            fds = [
                sealed_file(stack, text.encode("utf-8", errors="replace")) for text in (code, stdin)
            ]
            try:
                socket.send_fds(self._socket, [b"call"], fds)
                async with asyncio.timeout(timeout_s):
                    answer = await self._loop.sock_recv(self._socket, _ANSWER_BYTES)
            except TimeoutError:
                self.end("timeout")
                return None
            except OSError:
                return None
        return int(answer) if answer.isdigit() and int(answer) < 256 else None

    def end(self, why: Cut | None = None) -> None:
        """Kills it; `ended` waits until it is gone."""
        self._is_ending = True
        self._why = self._why or why
        if self._timer:
            self._timer.cancel()
        if self._running:
            self._running.kill()

    async def ended(self) -> None:
        await self._gone.wait()

    def _rest(self) -> None:
        """Stops it until the next call, which must come within `idle_s`."""
        if self._running and not self._is_ending:
            self._running.pause()
            self._timer = self._loop.call_later(self._idle_s, self.end)

    def _wake(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._running:
            self._running.resume()
