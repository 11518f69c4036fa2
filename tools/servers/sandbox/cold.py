"""The cold way: a bubblewrap and an interpreter for each program. Used if no zygote can start.

All of a program's processes are in a pid namespace that dies with the bubblewrap process that we
started. Its init is bubblewrap's and has the program's own rights; the system call filter refuses
what would let the program reach into it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal

from tools.servers.sandbox.descriptors import Streams, memory_file, sealed_file
from tools.servers.sandbox.isolation import Isolation, standing_files
from tools.servers.sandbox.languages import WORK, python
from tools.servers.sandbox.memory import Group
from tools.servers.sandbox.program import MAX_FETCH_BYTES, Program, Running, SandboxError
from tools.servers.sandbox.seccomp import filter_program

# Set inside, by the sandbox's own shell: outside, a limit on processes would count all processes of
# the user nobody on the machine. dash calls RLIMIT_NPROC -p, bash -u.
_LIMITS = """
ulimit -c "$1"; ulimit -t "$2"; ulimit -f "$3"; ulimit -n "$4"
ulimit -u "$5" 2>/dev/null || ulimit -p "$5"
ulimit "$6" "$7"
shift 7; exec "$@"
"""

# Runs the program as its child, then writes the fetched files to a file of ours. It runs inside: a
# link that the program made leads only where the program itself could go.
_FETCH = f"""
import base64, json, os, subprocess, sys
out, names, command = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
code = subprocess.call(command)
found = {{}}
for name in names:
    if os.path.isfile(name) and os.path.getsize(name) <= {MAX_FETCH_BYTES}:
        with open(name, 'rb') as file:
            found[name] = base64.b64encode(file.read()).decode()
with open(out, 'w') as file:
    json.dump(found, file)
sys.exit(code if code >= 0 else 128 - code)
"""


class Cold:
    """A `Launcher`."""

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation

    async def start(self, program: Program, streams: Streams, group: Group) -> Running:
        """See `Launcher`."""
        with contextlib.ExitStack() as stack:
            given = {
                f"{WORK}/{path}": base64.b64decode(content)
                for path, content in program.files.items()
            }
            files = {
                path: sealed_file(stack, content)
                for path, content in {**standing_files(), **given}.items()
            }
            filter_fd, status = sealed_file(stack, filter_program()), memory_file(stack)
            options = [
                "--disable-userns",
                "--seccomp",
                str(filter_fd),
                "--json-status-fd",
                str(status),
            ]
            process = await asyncio.create_subprocess_exec(
                *self._isolation.command(
                    options, files, _limited(program, _fetching(program, streams.fetched))
                ),
                stdin=streams.stdin,
                stdout=streams.stdout.write_fd,
                stderr=streams.stderr.write_fd,
                pass_fds=[
                    status,
                    filter_fd,
                    *([streams.fetched] if program.fetch else []),
                    *files.values(),
                ],
                preexec_fn=group.join,
                start_new_session=True,
                cwd="/",
                env={},
                **self._isolation.identity,
            )
            return _ColdProgram(process, os.dup(status), streams)

    async def close(self) -> None:
        """Nothing: programs share nothing."""


def _fetching(program: Program, fetched: int) -> tuple[str, ...]:
    if not program.fetch:
        return program.command
    return (python(), "-c", _FETCH, str(fetched), json.dumps(program.fetch), *program.command)


def _limited(program: Program, command: tuple[str, ...]) -> list[str]:
    """The command under the program's limits, in the shell's units: blocks of 512 bytes, KiB."""
    limits = program.limits
    memory = ("-v", limits["AS"] // 1024) if "AS" in limits else ("-d", limits["DATA"] // 1024)
    values = (
        limits["CORE"],
        limits["CPU"],
        limits["FSIZE"] // 512,
        limits["NOFILE"],
        limits["NPROC"],
        *memory,
    )
    return ["/bin/sh", "-c", _LIMITS, "sh", *map(str, values), *command]


def kill_bubblewrap(pid: int, status: int) -> None:
    """Kills a bubblewrap that leads a session of its own, and what it started, at any point.

    The process inside asks to die with the one outside only when it is set up. Until its id is in
    the status it waits in the same process group; from then on it can be killed by that id.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for line in os.pread(status, 1 << 16, 0).splitlines():
        # A ValueError: it died in the middle of a line.
        with contextlib.suppress(ProcessLookupError, ValueError):
            if inside := json.loads(line).get("child-pid"):
                os.kill(int(inside), signal.SIGKILL)


class _ColdProgram:
    """See `Running`."""

    def __init__(self, process: asyncio.subprocess.Process, status: int, streams: Streams) -> None:
        self._process = process
        self._status = status
        self._streams = streams
        self._is_killed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.returncode is None else None

    def kill(self) -> None:
        self._is_killed = True
        if self._process.returncode is None:
            kill_bubblewrap(self._process.pid, self._status)

    def pause(self) -> None:
        """Nothing: bubblewrap's init cannot do that."""

    def resume(self) -> None:
        """Nothing: nothing was stopped."""

    async def ended(self) -> int | None:
        await self._process.wait()
        for line in os.pread(self._status, 1 << 16, 0).splitlines():
            # bubblewrap says this only if the program was started.
            if (code := json.loads(line).get("exit-code")) is not None:
                return int(code)
        if self._is_killed:
            return None
        await self._streams.end()
        said = bytes(self._streams.stderr.kept).decode(errors="replace").strip()
        raise SandboxError(said or "bubblewrap ended and printed nothing")

    def close(self) -> None:
        os.close(self._status)
