"""What `GET /health` says: that the loop turns, how late it is, and what the sessions do."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from agent.gateway.sessions import GatewaySessions

EVERY_S = 0.05
KEPT = 1200
"""A minute of measurements."""


@dataclass(slots=True)
class LoopLag:
    """How much later than asked the event loop wakes up, in seconds, over the last minute."""

    lags_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to measure, on the running loop."""
        self._task = asyncio.create_task(self._measure())

    def stop(self) -> None:
        """Ends the measurement."""
        if self._task:
            self._task.cancel()

    async def _measure(self) -> None:
        while True:
            before = perf_counter()
            await asyncio.sleep(EVERY_S)
            self.lags_s.append(max(0.0, perf_counter() - before - EVERY_S))

    def figures(self) -> dict[str, float]:
        """Percentiles and the longest in milliseconds; 0.0 before the first measurement."""
        ordered = sorted(self.lags_s) or [0.0]
        places = {"p50": 50, "p99": 99, "max": 100}
        last = len(ordered) - 1
        return {
            name: round(1e3 * ordered[min(last, len(ordered) * percent // 100)], 2)
            for name, percent in places.items()
        }


def health(sessions: GatewaySessions, lag: LoopLag) -> dict[str, Any]:
    """The state of the gateway as JSON."""
    live, progress = sessions.live, sessions.progress
    return {
        "status": "ok",
        "loop_lag_ms": lag.figures(),
        "sessions": {"live": len(live), "finished": progress.done},
        "turns": progress.turns_so_far,
        "in_flight": sum(len(session.answering) for session in live),
        "branches": dict(sessions.reasons),
    }
