"""The engine and the event loop of a run.

Invariant: the engine starts on the session's own loop thread and sees no other; the thread lives
until `close`. Sync and async callers hand coroutines to it, so neither can give an SGLang engine a
second event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from agent.engines.engine import Engine
from agent.loop.runtime import Runtime
from agent.loop.tracing import start_tracing
from agent.runs.parts import Parts, loop_settings, start_engine

T = TypeVar("T")


class Session:
    """Starts the tools and the engine of `parts`, and blocks until they are up.

    That takes seconds to a minute. Close it, or use `with`. The tools are closed with the session.
    `log_path` is where the engine's processes write; None: this process's output. `start` makes
    another engine than the config's. Raises EngineStartError, ToolsError and other one-line errors;
    then nothing is left running.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        validate: bool = False,
        log_path: Path | None = None,
        start: Callable[[], Engine] | None = None,
    ) -> None:
        self.parts = parts
        self._tracing = start_tracing()
        self._is_over = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="turntrace-loop", daemon=True)
        self._started: concurrent.futures.Future[Engine] = concurrent.futures.Future()
        self._start = start or functools.partial(start_engine, parts.config, log_path)
        self._thread.start()
        try:
            self.engine = self._started.result()
            runtime = parts.runtime(self.engine, parts.config.sampling(validate))
            self.runtime = dataclasses.replace(runtime, observer=self._tracing)
        except BaseException:
            self.close()
            raise

    def runtime_with(self, sampling: Mapping[str, Any], max_tokens: int | None = None) -> Runtime:
        """`runtime` with other sampling params and another cap on a turn's tokens."""
        settings = loop_settings(self.parts.config, sampling, max_tokens)
        return dataclasses.replace(self.runtime, settings=settings)

    def _serve(self) -> None:
        """The loop thread.

        It starts SGLang, because SGLang's children end with the thread that started them. Tools
        start first: what they lack is known in a second, an engine takes a minute.
        """
        asyncio.set_event_loop(self._loop)
        try:
            if self.parts.tools:
                self._loop.run_until_complete(self.parts.tools.start())
            engine = self._start()
            if connect := getattr(engine, "connect", None):
                self._loop.run_until_complete(connect())
            self._started.set_result(engine)
        except BaseException as error:
            self._started.set_exception(error)
        while not self._is_over:
            # A SystemExit in a task ends `run_forever`; the task has it, and its caller gets it.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    # ------------------------------------------------------------------ handing work to the loop

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        poll: Callable[[], None] | None = None,
        every_s: float = 0.2,
    ) -> T:
        """Runs the coroutine on the loop and waits for its result.

        Meanwhile `poll` is called every `every_s` seconds.

        Ctrl-C cancels the coroutine and waits for its clean-up; then KeyboardInterrupt is raised.
        """
        work = _Work(coroutine)
        self._call(work.start, coroutine)
        try:
            while not concurrent.futures.wait((work.outcome,), every_s).done:
                if poll:
                    poll()
        except BaseException:
            self._call(work.cancel, coroutine)
            concurrent.futures.wait((work.outcome,))
            raise
        result: T = work.outcome.result()
        return result

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run` for async code. Cancelling it cancels the coroutine and waits for its clean-up."""
        work = _Work(coroutine)
        self._call(work.start, coroutine)
        outcome = asyncio.wrap_future(work.outcome)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            self._call(work.cancel, coroutine)
            await asyncio.wait((outcome,))
            # Read it: asyncio prints an exception that nothing has read.
            outcome.cancelled() or outcome.exception()
            raise

    def _call(self, callback: Callable[[], object], coroutine: Coroutine[Any, Any, Any]) -> None:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this engine is closed; start another one")
        self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancels what runs, closes tools and engine, ends the loop thread.

        Safe to call twice, and during start.
        """
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._cancel_all)
        concurrent.futures.wait((self._started,))  # SGLang's start cannot be interrupted
        try:
            self.run(self._close_parts())
        finally:
            self._is_over = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self._tracing:
                self._tracing.close()

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    async def _close_parts(self) -> None:
        try:
            if self.parts.tools:
                await self.parts.tools.close()
        finally:
            if self._started.exception() is None:
                await self._started.result().close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Work:
    """A coroutine handed to the loop. `outcome` is done when it has ended and cleaned up."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        if self._task:
            self._task.cancel()

    def _end(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())
