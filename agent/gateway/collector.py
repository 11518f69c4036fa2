"""Python's garbage collector, kept from stopping the event loop.

A full collection walks every object: with 1,000 sessions it stops the loop for 0.3 s of CPU, and
for longer the more turns there are. So what lives longer than a second is frozen: no collection
walks it, and it still goes when nothing refers to it. Cycles among frozen objects stay until a
thaw, which comes when no turn is being sampled. Sessions break their own cycles when they end.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

FREEZE_EVERY_S = 1.0
THAW_EVERY_S = 60.0


@dataclass(slots=True)
class Collector:
    """Freezes what lives, from `start` to `stop`. `is_busy` says whether a pause would be felt.

    It is the process's collector: nothing else in the process should call `gc.unfreeze`.
    """

    is_busy: Callable[[], bool]
    _thawed: float = 0.0
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, on the running loop."""
        gc.freeze()
        self._thawed = monotonic()
        self._task = asyncio.create_task(self._tend())

    def stop(self) -> None:
        """Leaves the collector as it was. Safe to call twice."""
        if self._task:
            self._task.cancel()
            self._task = None
            gc.unfreeze()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(FREEZE_EVERY_S)
            if monotonic() - self._thawed >= THAW_EVERY_S and not self.is_busy():
                self._thaw()
            else:
                gc.collect()  # what came since the last freeze
                gc.freeze()

    def _thaw(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._thawed = monotonic()
