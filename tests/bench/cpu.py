"""CPU time of one call, the same way for every side of a comparison."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def cpu_ms(call: Callable[[], object], run_s: float = 0.01) -> float:
    """The least of five runs' means, in milliseconds of CPU. A run takes about `run_s`."""
    started = time.process_time()
    call()
    repeats = max(1, int(run_s / max(1e-6, time.process_time() - started)))
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, time.process_time() - started)
    return best / repeats * 1000


def answer_cpu_s() -> None:
    """For a process that is measured from outside: the CPU seconds that it used, for each line of
    stdin.
    """
    for _ in sys.stdin:
        print(time.process_time(), flush=True)
