"""The warm way: a zygote inside bubblewrap, kept ready, that starts each program with two forks.

Why no stock of started interpreters: each costs a whole start of bubblewrap and Python, so under
load, when it matters, the stock is empty and the throughput is the cold one. A fork costs a
quarter. It is as safe, because the zygote reads no request and answers none, and no program can
reach it (`zygote.py` says why).

Each request has a socket of its own, whose other end goes to its init process. Init sends a pidfd,
by which the server kills the program and learns that all of it is dead, and at last how it ended.
If the zygote dies, its programs die with it, and the next request starts another.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from tools.servers.sandbox.cold import kill_bubblewrap
from tools.servers.sandbox.descriptors import Drain, Streams, memory_file, sealed_file
from tools.servers.sandbox.isolation import Isolation, standing_files
from tools.servers.sandbox.languages import python
from tools.servers.sandbox.memory import Group
from tools.servers.sandbox.program import (
    MAX_FETCH_BYTES,
    MAX_SCRATCH_FILES,
    SCRATCH_BYTES,
    SHARED_MEMORY_BYTES,
    Program,
    Running,
    SandboxError,
)
from tools.servers.sandbox.seccomp import filter_program

_SOURCE = Path(__file__).with_name("zygote.py")
_INSIDE = "/opt/zygote.py"
_START_S = 10.0
_MESSAGE_BYTES = 1 << 16


class Warm:
    """One zygote, a `Launcher`. `close` ends it and everything that it started."""

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._lock = asyncio.Lock()
        self._zygote: _Zygote | None = None

    async def start(self, program: Program, streams: Streams, group: Group) -> Running:
        """See `Launcher`."""
        async with self._lock:
            if self._zygote is None or self._zygote.is_dead:
                await self.close()
                self._zygote = await _Zygote.started(self._isolation)
        message = {
            "program": program.command,
            "files": program.files,
            "fetch": program.fetch,
            "limits": program.limits,
        }
        with contextlib.ExitStack() as stack:
            request = sealed_file(stack, json.dumps(message).encode())
            fds = {
                "s": request,
                "i": streams.stdin,
                "o": streams.stdout.write_fd,
                "e": streams.stderr.write_fd,
            }
            if program.fetch:
                fds["f"] = streams.fetched
            if group.join_fd is not None:
                fds["m"] = group.join_fd
            try:
                return _WarmProgram(self._zygote, fds)
            except OSError as error:
                raise SandboxError(await self._zygote.last_words()) from error

    async def close(self) -> None:
        """Ends the zygote. Safe to call twice."""
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            await zygote.close()


def _settings() -> str:
    """The zygote's settings; see its `main`."""
    return json.dumps(
        {
            "scratch_bytes": SCRATCH_BYTES,
            "shared_memory_bytes": SHARED_MEMORY_BYTES,
            "max_files": MAX_SCRATCH_FILES,
            "max_fetch_bytes": MAX_FETCH_BYTES,
            "filter": base64.b64encode(filter_program()).decode(),
        }
    )


class _Zygote:
    """The process, and our end of its channel, which carries only descriptors.

    It prints nothing but the reason if it fails.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, status: int, channel: socket.socket, words: Drain
    ) -> None:
        self._process = process
        self._status = status
        self._channel = channel
        self._words = words

    @classmethod
    async def started(cls, isolation: Isolation) -> _Zygote:
        words = Drain(lambda: None, _MESSAGE_BYTES)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            stack.callback(words.close_write_end)
            status = memory_file(stack)
            files = {
                path: sealed_file(stack, content)
                for path, content in {**standing_files(), _INSIDE: _SOURCE.read_bytes()}.items()
            }
            command = [python(), _INSIDE, str(theirs.fileno()), _settings()]
            process = await asyncio.create_subprocess_exec(
                *isolation.command(
                    ["--cap-add", "ALL", "--json-status-fd", str(status)], files, command
                ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=words.write_fd,
                stderr=words.write_fd,
                pass_fds=[theirs.fileno(), status, *files.values()],
                start_new_session=True,
                cwd="/",
                env={},
                **isolation.identity,
            )
            return cls(process, os.dup(status), ours, words)

    @property
    def is_dead(self) -> bool:
        return self._process.returncode is not None

    def send(self, fds: dict[str, int]) -> None:
        """Raises OSError if the zygote is dead or its channel full."""
        socket.send_fds(self._channel, ["".join(fds).encode()], list(fds.values()))

    def kill(self) -> None:
        if not self.is_dead:
            kill_bubblewrap(self._process.pid, self._status)

    async def last_words(self) -> str:
        """The last line that it printed: why it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._words.end()
        lines = [
            line
            for line in bytes(self._words.kept).decode(errors="replace").splitlines()
            if line.strip()
        ]
        return lines[-1] if lines else "the zygote could not start a process"

    async def close(self) -> None:
        self._channel.close()
        self.kill()
        await self._process.wait()
        self._words.close()
        os.close(self._status)


class _WarmProgram:
    """A program's socket: its init sends a pidfd and then, as JSON, the result. See `Running`."""

    def __init__(self, zygote: _Zygote, fds: dict[str, int]) -> None:
        self._zygote = zygote
        self._loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._pidfd: int | None = None
        self._result: dict[str, Any] = {}
        self._is_killed = False
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._dead: asyncio.Future[None] = self._loop.create_future()
        with theirs:
            try:
                zygote.send({"c": theirs.fileno(), **fds})
            except OSError:
                self._control.close()
                raise
        self._loop.add_reader(self._control.fileno(), self._hear)

    def _hear(self) -> None:
        """Reads all messages. The stream ends when no process holds the other end."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            if fds:
                self._started_as(fds[0])
            elif message:
                # The first value counts: a program cannot take it back.
                self._result = {**json.loads(message), **self._result}
            if not self._started.done():
                self._started.set_result(None)
            if not message:
                self._loop.remove_reader(self._control.fileno())
                return

    def _started_as(self, pidfd: int) -> None:
        self._pidfd = pidfd
        self._loop.add_reader(pidfd, self._die, pidfd)
        if self._is_killed:
            self.kill()

    def _die(self, pidfd: int) -> None:
        """A pidfd is readable when its process is gone: init ends last, after its messages."""
        self._loop.remove_reader(pidfd)
        self._hear()
        self._loop.remove_reader(self._control.fileno())
        self._dead.set_result(None)

    @property
    def pid(self) -> int | None:
        if self._pidfd is None:
            return None
        with open(f"/proc/self/fdinfo/{self._pidfd}") as file:
            pid = next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)
        return pid if pid > 0 else None

    def kill(self) -> None:
        self._is_killed = True
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        self._order(b"pause")

    def resume(self) -> None:
        self._order(b"resume")

    def _order(self, order: bytes) -> None:
        """Sends an order, and a signal to read it. Signals alone could be merged or swapped."""
        with contextlib.suppress(OSError):
            self._control.send(order)
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        """Signals init."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def ended(self) -> int | None:
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.shield(self._started)
        except TimeoutError as error:
            self._zygote.kill()
            raise SandboxError(f"the zygote did not answer within {_START_S:g} s") from error
        if self._pidfd is None:
            raise SandboxError(await self._zygote.last_words())
        await asyncio.shield(self._dead)
        if "error" in self._result:
            raise SandboxError(self._result["error"])
        if "exit" not in self._result and not self._is_killed and self._zygote.is_dead:
            raise SandboxError("the zygote died")
        return self._result.get("exit")

    def close(self) -> None:
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
