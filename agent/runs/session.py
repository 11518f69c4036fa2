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
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from agent.engines.engine import Engine
from agent.loop.runtime import Runtime
from agent.loop.tracing import start_tracing
from agent.runs.loop_thread import LoopThread
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
        self._started: concurrent.futures.Future[Engine] = concurrent.futures.Future()
        self._start = start or functools.partial(start_engine, parts.config, log_path)
        self._loop = LoopThread(self._start_parts)
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

    def _start_parts(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the loop's thread, before the loop runs.

        It starts SGLang, because SGLang's children end with the thread that started them. Tools
        start first: what they lack is known in a second, an engine takes a minute.
        """
        try:
            if self.parts.tools:
                loop.run_until_complete(self.parts.tools.start())
            engine = self._start()
            if connect := getattr(engine, "connect", None):
                loop.run_until_complete(connect())
            self._started.set_result(engine)
        except BaseException as error:
            self._started.set_exception(error)

    # ------------------------------------------------------------------ handing work to the loop

    def run(
        self, coroutine: Coroutine[Any, Any, T], *, poll: Callable[[], None] | None = None
    ) -> T:
        """Runs the coroutine on the loop and waits for its result; see `LoopThread.run`."""
        return self._loop.run(coroutine, poll=poll)

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run` for async code. Cancelling it cancels the coroutine and waits for its clean-up."""
        return await self._loop.arun(coroutine)

    def close(self) -> None:
        """Cancels what runs, closes tools and engine, ends the loop thread.

        Safe to call twice, and during start.
        """
        if self._loop.is_closed:
            return
        self._loop.cancel_all()
        concurrent.futures.wait((self._started,))  # SGLang's start cannot be interrupted
        try:
            self.run(self._close_parts())
        finally:
            self._loop.close()
            if self._tracing:
                self._tracing.close()

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


class KeptSession(contextlib.AbstractContextManager["KeptSession"]):
    """One session for several runs that differ in seed, temperature and `n` alone.

    The first run that needs it starts it; it is closed at the end of the `with` block.
    """

    def __init__(self) -> None:
        self._session: Session | None = None

    @property
    def seed(self) -> int | None:
        """The seed of the engine; None if it is not started."""
        return self._session.parts.config.seed if self._session else None

    def get(self, parts: Parts, start: Callable[[], Session]) -> Session:
        """The session for a run of `parts`; `start` makes it if there is none yet.

        Raises ValueError if the session cannot run them: another config, or images, which are read
        into one run's folder. What `start` raises is raised.
        """
        if parts.images:
            raise ValueError("a kept session has no place for images")
        if self._session is None:
            self._session = start()
        elif _kept(parts) != _kept(self._session.parts):
            raise ValueError("a kept session runs one config, but for seed, temperature and n")
        return self._session

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def _kept(parts: Parts) -> tuple[object, ...]:
    """What runs of one session share."""
    rollout = parts.config.rollout.model_dump(exclude={"temperature", "n"})
    return parts.config.model_path, rollout, parts.config.path
