"""One command as a user starts it, measured: a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

_PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Runs a command and prints its peak in KiB. A process of its own: a child's peak is never below
that of the process it was forked from.
"""


def measured(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall seconds of `turntrace` with these arguments, and the peak MiB of its largest process.

    Raises RuntimeError where it does not end with 0.
    """
    command = [sys.executable, "-m", "agent", *arguments]
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", _PEAK, *command], stdout=subprocess.PIPE, text=True)
    wall_s = time.perf_counter() - started
    if ran.returncode:
        raise RuntimeError(f"turntrace {' '.join(arguments)} ended with {ran.returncode}")
    return wall_s, int(ran.stdout) / 1024
