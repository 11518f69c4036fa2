"""One program, from request to answer: start it shut in, drain what it prints, end it and everything it started.

The program's whole tree lives in a pid namespace that dies with the bubblewrap process we started, so ending that one
process ends everything. What goes in and comes out besides stdout and stderr goes through files in memory: nothing of a
request ever lies on a disk.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tools.servers.isolation import ETC, MIB, WORK, Isolation, Limits
from tools.servers.wire import CommandRunResult, RunCodeRequest, RunCodeResponse

MAX_OUTPUT_BYTES = 4 * MIB  # of stdout, and of stderr
MAX_FETCH_BYTES = 32 * MIB  # of one fetched file
DEFAULT_MEMORY_MIB = 2048  # where a request leaves it to the server

_CHUNK_BYTES = 1 << 18

# Runs the program as its child, then writes the files asked for to a file of ours. It runs inside: a link that the
# program made leads nowhere that the program could not go itself.
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


class _SandboxError(Exception):
    """The sandbox, not the program, failed: the program never ran, or how it ended is not known."""


@dataclass(slots=True)
class _Output:
    """What a program printed, and why it was ended from outside, if it was."""

    stdout: bytearray
    stderr: bytearray
    cut: Literal["timeout", "output"] | None = None


async def run_code(isolation: Isolation, request: RunCodeRequest) -> RunCodeResponse:
    """Runs one request. Always answers, with SandboxError where the sandbox failed; cancelling it ends the program."""
    with contextlib.ExitStack() as stack:
        try:
            return await _run(isolation, request, stack)
        except (_SandboxError, OSError, ValueError) as error:
            return RunCodeResponse(status="SandboxError", message=str(error))


async def _run(isolation: Isolation, request: RunCodeRequest, stack: contextlib.ExitStack) -> RunCodeResponse:
    program = isolation.languages[request.language]
    status = _memory_file(stack)
    stdin = _sealed_file(stack, _utf8(request.stdin or ""))
    files = {path: _sealed_file(stack, content) for path, content in _files(request, program[-1]).items()}
    inherited = [status, *files.values()]
    if request.fetch_files:
        inherited.append(fetched := _memory_file(stack))
        program = (isolation.languages["python"][0], "-c", _FETCH, str(fetched), json.dumps(request.fetch_files), *program)
    limits = Limits(cpu_s=math.ceil(request.run_timeout) + 1, memory_mib=_memory_mib(request))
    started = time.perf_counter()
    output = await _output_of(
        isolation.command(program, limits, files, status),
        request.run_timeout,
        stdin=stdin,
        pass_fds=inherited,
        **isolation.identity,
    )
    wall_s = time.perf_counter() - started
    result = _result(output, wall_s, None if output.cut else _exit_code(status, output))
    found = _json_of(fetched) if request.fetch_files and not output.cut else {}
    return RunCodeResponse(status="Success" if result.return_code == 0 else "Failed", run_result=result, files=found)


def _memory_mib(request: RunCodeRequest) -> int:
    return request.memory_limit_MB if request.memory_limit_MB > 0 else DEFAULT_MEMORY_MIB


def _files(request: RunCodeRequest, main: str) -> dict[str, bytes]:
    given = {f"{WORK}/{path}": base64.b64decode(content) for path, content in request.files.items() if content is not None}
    return {**ETC, **given, main: _utf8(request.code)}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _memory_file(stack: contextlib.ExitStack) -> int:
    """A file without a name, gone with the request."""
    fd = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _sealed_file(stack: contextlib.ExitStack, content: bytes) -> int:
    """One that nobody inside can change or make grow."""
    fd = _memory_file(stack)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


async def _output_of(command: list[str], timeout_s: float, **spawn: Any) -> _Output:
    """Runs a command to its end, its time limit or its output limit. When it returns, or raises, the command is dead."""
    spawn |= {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, "cwd": "/", "env": {}, "limit": _CHUNK_BYTES}
    process = await asyncio.create_subprocess_exec(*command, **spawn)
    output = _Output(bytearray(), bytearray())

    def end(cut: Literal["timeout", "output"] | None) -> None:
        output.cut = output.cut or cut
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    drains = (_drain(process.stdout, output.stdout, end), _drain(process.stderr, output.stderr, end))
    ended = asyncio.gather(process.wait(), *drains)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(ended)
    except TimeoutError:
        end("timeout")
    finally:
        end(None)
        await ended
    return output


async def _drain(stream: asyncio.StreamReader | None, kept: bytearray, end: Callable[[Literal["output"]], None]) -> None:
    """Reads to the end of the pipe, however much there is: asyncio tells of a process's end only after that of its pipes."""
    while stream is not None and (chunk := await stream.read(_CHUNK_BYTES)):
        if len(kept) + len(chunk) > MAX_OUTPUT_BYTES:
            end("output")
        kept += chunk[: MAX_OUTPUT_BYTES - len(kept)]


def _exit_code(status: int, output: _Output) -> int:
    """The program's exit code, from bubblewrap's own account: it writes one only if the program was really started."""
    for line in os.pread(status, 1 << 16, 0).splitlines():
        if (code := json.loads(line).get("exit-code")) is not None:
            return int(code)
    raise _SandboxError(output.stderr.decode(errors="replace").strip() or "bubblewrap ended without a word")


def _result(output: _Output, wall_s: float, return_code: int | None) -> CommandRunResult:
    stdout, stderr = (bytes(stream).decode(errors="replace") for stream in (output.stdout, output.stderr))
    if output.cut == "output":
        stderr += f"\nThe program printed more than {MAX_OUTPUT_BYTES // MIB} MiB and was stopped."
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    status = "TimeLimitExceeded" if output.cut == "timeout" else "Error" if output.cut else "Finished"
    return CommandRunResult(status=status, execution_time=wall_s, return_code=return_code, stdout=stdout, stderr=stderr)


def _json_of(fd: int) -> dict[str, str]:
    """The fetched files. The program can write here, too, so what is not as we wrote it counts for nothing."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        content = file.read()
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return {str(name): text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
