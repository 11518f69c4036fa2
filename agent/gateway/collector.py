"""Python's garbage collector, kept from stopping the event loop.

A full collection walks every object: with 1,000 sessions it stops the loop for 0.3 s of CPU, and
for longer the more turns there are. So what lives longer than a second is frozen: no collection
walks it, and it still goes when nothing refers to it. Cycles among frozen objects stay until a
thaw, which comes when no turn is being sampled, or ten minutes after the last one. Sessions break
their own cycles when they end.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

FREEZE_EVERY_S = 1.0
THAW_EVERY_S = 60.0
THAW_AT_LATEST_S = 10 * THAW_EVERY_S
"""After so long it thaws while turns are sampled: a gateway that is always busy has cycles, too."""


@dataclass(slots=True)
class Collector:
    """Freezes what lives, from `start` to `stop`. `is_busy` says whether a pause would be felt.

    It is the process's collector: nothing else in the process should call `gc.unfreeze`. What
    others froze is walked at a thaw and frozen again; `stop` leaves it unfrozen.
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
        """Leaves nothing frozen, whoever froze it. Safe to call twice."""
        if self._task:
            self._task.cancel()
            self._task = None
            gc.unfreeze()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(FREEZE_EVERY_S)
            since_s = monotonic() - self._thawed
            if since_s >= (THAW_AT_LATEST_S if self.is_busy() else THAW_EVERY_S):
                self._thaw()
            else:
                gc.collect()  # what came since the last freeze
                gc.freeze()

    def _thaw(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._thawed = monotonic()
