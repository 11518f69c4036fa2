"""CPU time of one call, the same way for every side of a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_ms(call: Callable[[], object], repeats: int = 300) -> float:
    """The least of five runs' means, in milliseconds of CPU."""
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, time.process_time() - started)
    return best / repeats * 1000
