"""Ends the programs of a process that was killed.

    python keeper.py    reads lines from stdin: `+GROUP` a program began, `-GROUP` it has ended

When stdin closes, because its writer ended in whatever way, the process groups that did not end get
SIGKILL. Nobody else would end them: a program has a session of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress


class Keeper:
    """Knows the running programs of this process. Started with the first; `close` ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def began(self, group: int) -> None:
        """A program runs in this process group."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        """Nothing of the program is left."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Ends the keeper, and what it still knows."""
        process, self._process = self._process, None
        if process and process.stdin:
            with suppress(OSError):
                process.stdin.close()
            process.wait()

    def _tell(self, line: str) -> None:
        if self._process and self._process.stdin:
            with suppress(OSError):  # somebody ended it: programs end with us as they can
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()


def keep(lines: Iterable[str]) -> None:
    """Reads to the end, then ends the groups that are left."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    keep(sys.stdin)
