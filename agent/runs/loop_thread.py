"""An event loop on a thread of its own, for programs whose main thread waits and shows progress.

Invariant: what is handed to the loop runs there and nowhere else, and whoever handed it over waits
for its clean-up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """The thread runs from here to `close`.

    `begin` is called on it with the loop, before the loop runs; it may run coroutines to their end.
    """

    def __init__(self, begin: Callable[[asyncio.AbstractEventLoop], None] | None = None) -> None:
        self._begin = begin
        self._is_over = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="turntrace-loop", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        if self._begin:
            self._begin(self._loop)
        while not self._is_over:
            # A SystemExit in a task ends `run_forever`; the task has it, and its caller gets it.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._loop.is_closed()

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

    def cancel_all(self) -> None:
        """Cancels every task on the loop."""
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def close(self) -> None:
        """Ends loop and thread. What still runs there is lost: cancel it before."""
        self._is_over = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


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
