"""One request, from the wire to the answer: start its program, drain its output, end all of it.

Invariant: when `run_code` returns, nothing of the program is left, no process, no scratch file and
no memory group, whether it ended by itself, over a limit, or because the client hung up.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Literal

from tools.servers.sandbox.descriptors import MAX_OUTPUT_BYTES, Streams, sealed_file
from tools.servers.sandbox.languages import BINARY, Language
from tools.servers.sandbox.memory import MIB, Group, Groups, watch
from tools.servers.sandbox.program import MAX_FETCH_BYTES, Launcher, Program, Running, SandboxError
from tools.servers.sandbox.wire import CommandRunResult, RunCodeRequest, RunCodeResponse

DEFAULT_MEMORY_MIB = 2048  # if a request leaves it to the server
MIN_MEMORY_MIB = 32  # an interpreter needs it to start
MAX_MEMORY_MIB = 1 << 30  # more does not fit into the kernel's limits

_KILLED = 137  # in a shell's words: 128 + SIGKILL

Cut = Literal["timeout", "output", "memory"]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """How to start programs, and how to bound their memory."""

    launcher: Launcher
    groups: Groups


@dataclass(slots=True)
class ProgramResult:
    """The result of a program.

    cut: why the server ended it; None if it ended by itself
    files: fetched ones; None if they could not be read
    """

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    wall_s: float
    cut: Cut | None
    files: dict[str, str] | None


async def run_code(
    sandbox: Sandbox, language: Language, request: RunCodeRequest
) -> RunCodeResponse:
    """Runs one request. Always answers, with SandboxError if the sandbox failed.

    Cancelling it ends the program.
    """
    try:
        return await _answer(sandbox, language, request)
    except (SandboxError, OSError) as error:
        return RunCodeResponse(status="SandboxError", message=str(error))


async def _answer(sandbox: Sandbox, language: Language, request: RunCodeRequest) -> RunCodeResponse:
    program = _program(language, request)
    compiled = None
    if language.compile:
        step = replace(
            program, command=language.compile, fetch=(BINARY,), timeout_s=request.compile_timeout
        )
        outcome = await run_program(sandbox, step)
        compiled = result(outcome, step.memory_mib)
        binary = (outcome.files or {}).get(BINARY)
        if compiled.return_code != 0 or binary is None:
            return RunCodeResponse(
                status="Failed",
                message="" if compiled.return_code else "nothing was compiled",
                compile_result=compiled,
            )
        program = replace(program, files={**program.files, BINARY: binary})
    outcome = await run_program(sandbox, program, utf8(request.stdin or ""))
    ran = result(outcome, program.memory_mib)
    return RunCodeResponse(
        status="Success" if ran.return_code == 0 else "Failed",
        message=_missed(request, outcome),
        compile_result=compiled,
        run_result=ran,
        files=outcome.files or {},
    )


def _program(language: Language, request: RunCodeRequest) -> Program:
    given = {path: content for path, content in request.files.items() if content is not None}
    code = base64.b64encode(utf8(request.code)).decode()
    return Program(
        command=language.run,
        files={**given, language.file: code},
        fetch=tuple(request.fetch_files),
        timeout_s=request.run_timeout,
        memory_mib=memory_mib(request.memory_limit_MB),
        reserves_memory=language.reserves_memory,
    )


def utf8(text: str) -> bytes:
    """Half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", errors="replace")


def memory_mib(requested: int) -> int:
    if requested <= 0:
        return DEFAULT_MEMORY_MIB
    return min(max(requested, MIN_MEMORY_MIB), MAX_MEMORY_MIB)


def _missed(request: RunCodeRequest, outcome: ProgramResult) -> str:
    missed = [path for path in request.fetch_files if path not in (outcome.files or {})]
    why = f"no regular file of at most {MAX_FETCH_BYTES // MIB} MiB"
    return (
        f"not fetched, for it is {why}: {', '.join(missed)}" if missed and not outcome.cut else ""
    )


async def run_program(sandbox: Sandbox, program: Program, stdin: bytes = b"") -> ProgramResult:
    """Runs a program to its end or to a limit of time, output or memory.

    Raises SandboxError, OSError.
    """
    cut: Cut | None = None
    running: Running | None = None

    def end(why: Cut) -> None:
        nonlocal cut
        cut = cut or why
        if running is not None:
            running.kill()

    async with sandbox.groups.group(program.memory_mib) as group:
        with contextlib.ExitStack() as stack:
            streams = Streams(stack, sealed_file(stack, stdin), lambda: end("output"))
            started = time.perf_counter()
            running = await sandbox.launcher.start(program, streams, group)
            stack.callback(running.close)
            streams.close_write_ends()
            async with watched(running, program.memory_mib, group, end):
                code = await _ended(running, program.timeout_s, end)
            await streams.end()
            wall_s = time.perf_counter() - started
            files = streams.fetched_files() if program.fetch and code is not None else {}
            if cut is None and group.kills():
                cut = "memory"
            return ProgramResult(
                code, bytes(streams.stdout.kept), bytes(streams.stderr.kept), wall_s, cut, files
            )


async def _ended(running: Running, timeout_s: float, end: Callable[[Cut], None]) -> int | None:
    """Its exit code, None if it was killed. When this returns or raises, it is dead."""
    ended = asyncio.ensure_future(running.ended())
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.wait([ended])
    except TimeoutError:
        end("timeout")
    finally:
        running.kill()
        await asyncio.wait([ended])
    return ended.result()


@contextlib.asynccontextmanager
async def watched(
    running: Running, memory_mib: int, group: Group, end: Callable[[Cut], None]
) -> AsyncIterator[None]:
    """Watches the memory during the block if there is no group to bound it."""
    if group.join_fd is not None:
        yield
        return
    watching = asyncio.create_task(watch(lambda: running.pid, memory_mib, lambda: end("memory")))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def result(outcome: ProgramResult, memory_mib: int) -> CommandRunResult:
    """The result on the wire; stderr ends with the reason if it was cut.

    A program that was killed for its memory looks like one that the machine killed.
    """
    stdout, stderr = (
        stream.decode(errors="replace") for stream in (outcome.stdout, outcome.stderr)
    )
    if outcome.cut == "output":
        stderr += f"\nThe program printed more than {MAX_OUTPUT_BYTES // MIB} MiB and was stopped."
    if outcome.cut == "memory":
        stderr += (
            f"\nThe program's processes together reached the limit of {memory_mib} MiB of memory "
            "and some were killed."
        )
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    status = (
        "TimeLimitExceeded"
        if outcome.cut == "timeout"
        else "Error"
        if outcome.cut == "output"
        else "Finished"
    )
    code = None
    if status == "Finished":
        code = _KILLED if outcome.exit_code is None else outcome.exit_code
    return CommandRunResult(
        status=status, execution_time=outcome.wall_s, return_code=code, stdout=stdout, stderr=stderr
    )
