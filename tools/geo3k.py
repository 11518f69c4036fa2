"""Geometry answers, graded as verl 0.6.1 grades them: by mathruler, to which "1/2" equals "0.5".

mathruler passes what a model wrote to sympy, which may never finish (`9**9**9**9`). So grading runs
in other processes, `tools.servers.grader`, which end themselves if an answer takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tools.answer import AnswerTool
from tools.base import BackendError, ToolConfigError
from tools.extras import require

ATTEMPTS = 2
"""A process that was killed from outside says nothing about the answer, which gets another one."""

READY_S = 60.0

_ROOT = Path(__file__).resolve().parents[1]


class Geo3kTool(AnswerTool):
    """Takes `answer`, LaTeX or plain. The tool's name is the schema's: `calc_geo3k_reward`, any.

    An answer that the grader fails over is worth 0.0, and `grading` in the call's metrics says why.
    If the grader is killed from outside, twice, that is a BackendError: the reward is unknown.
    """

    config_keys = frozenset()
    max_concurrency = min(4, os.cpu_count() or 1)

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        require("mathruler", "sympy", "pylatexenc", extra="geo3k")
        self._idle: list[GradingProcess] = []

    async def start(self) -> None:
        """Starts the first process. Raises ToolConfigError if it does not start."""
        try:
            self._idle.append(await GradingProcess.start())
        except BackendError as error:
            raise ToolConfigError(str(error)) from error

    async def grade(self, answer: str, ground_truth: str) -> tuple[float, dict[str, Any]]:
        killed: WorkerEndedError | None = None
        for _ in range(ATTEMPTS):
            worker = self._idle.pop() if self._idle else await GradingProcess.start()
            try:
                right = await worker.ask(answer, ground_truth)
            except WorkerEndedError as ended:
                if ended.by_the_answer:
                    return 0.0, {"grading": str(ended)}
                killed = ended
                continue
            self._idle.append(worker)
            return float(right), {}
        raise BackendError(f"{killed}, {ATTEMPTS} times") from killed

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().end()


_OVER_AN_ANSWER = {
    signal.SIGABRT: "it aborted",
    signal.SIGBUS: "it crashed",
    signal.SIGFPE: "it crashed",
    signal.SIGILL: "it crashed",
    signal.SIGPROF: "it took too long",
    signal.SIGSEGV: "it crashed",
}
"""How a process ends because of what it grades; every other signal comes from outside."""


class WorkerEndedError(Exception):
    """The process ended instead of answering.

    `code` is its exit code, negative for a signal. `by_the_answer`: what it graded ended it.
    """

    def __init__(self, code: int | None) -> None:
        signalled = -code if code is not None and code < 0 else 0
        # 255 is asyncio's word for a process whose status was lost.
        self.by_the_answer = signalled in _OVER_AN_ANSWER or code in range(1, 255)
        how = f"signal {signalled}" if signalled else f"exit code {code}"
        super().__init__(
            _OVER_AN_ANSWER.get(signalled, f"the grader ended by {how}")  # type: ignore[call-overload]
        )


class GradingProcess:
    """One grading process; it serves one question at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("a worker's stdin and stdout must be pipes")
        self._process = process
        self._stdin, self._line = process.stdin, process.stdout.readline

    @classmethod
    async def start(cls) -> GradingProcess:
        """Starts a process and waits until it is ready, about a second. Raises BackendError."""
        # -P: a `tools` folder in the user's working folder is not ours. A session of its own:
        # Ctrl-C is for this process to handle.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tools.servers.grader"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # sympy warns there of what models write
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
                ),
            },
            start_new_session=True,
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(READY_S):
                ready = await worker._line()
        except BaseException:
            await worker.end()
            raise
        if not ready:
            raise BackendError(
                f"the grader ended at its start with code {await process.wait()}; "
                "`python -m tools.servers.grader` says why"
            )
        return worker

    async def ask(self, answer: str, ground_truth: str) -> bool:
        """Whether the answer is right. Raises WorkerEndedError.

        The process is gone after that, and after a cancellation.
        """
        try:
            with contextlib.suppress(ConnectionError):
                self._stdin.write(json.dumps([answer, ground_truth]).encode() + b"\n")
                await self._stdin.drain()
            line = await self._line()
            if not line:
                raise WorkerEndedError(await self._code())
        except BaseException:
            await self.end()
            raise
        return bool(json.loads(line))

    async def _code(self) -> int | None:
        """The exit code of a process that closed its output; None if it does not end."""
        try:
            async with asyncio.timeout(READY_S):
                return await self._process.wait()
        except TimeoutError:
            return None

    async def end(self) -> None:
        """Ends the process, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
