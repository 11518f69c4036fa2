"""Ends the programs of a process that was killed, and removes their folders.

    python keeper.py    reads lines from stdin:
        +GROUP   a program began       -GROUP   it has ended
        +/HEX    a folder was made     -/HEX    it is gone; HEX is its path

When stdin closes, because its writer ended in whatever way, the process groups that did not end get
SIGKILL and the folders go. Nobody else would end them: a program has a session of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

MOST_REMOVALS = 50
"""How often a folder is tried to be removed, ten times a second."""


class Keeper:
    """Knows the running programs of this process, and their folders. The first starts it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def began(self, group: int) -> None:
        """A program runs in this process group."""
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        """Nothing of the program is left."""
        self._tell(f"-{group}\n")

    def made(self, folder: str) -> None:
        """This folder, an absolute path, is to go with the process."""
        self._tell(f"+/{os.fsencode(folder).hex()}\n")

    def removed(self, folder: str) -> None:
        """The folder is gone."""
        self._tell(f"-/{os.fsencode(folder).hex()}\n")

    def close(self) -> None:
        """Ends the keeper, and what it still knows."""
        process, self._process = self._process, None
        if process and process.stdin:
            with suppress(OSError):
                process.stdin.close()
            process.wait()

    def _tell(self, line: str) -> None:
        if self._process is None and line[0] == "+":
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        if self._process and self._process.stdin:
            with suppress(OSError):  # somebody ended it: programs end with us as they can
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()


def keep(lines: Iterable[str]) -> None:
    """Reads to the end, then ends the groups and removes the folders that are left."""
    left: set[str] = set()
    for line in lines:
        if line[0] == "+":
            left.add(line[1:].strip())
        else:
            left.discard(line[1:].strip())
    for group in (int(name) for name in left if name[0] != "/"):
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    folders = [os.fsdecode(bytes.fromhex(name[1:])) for name in left if name[0] == "/"]
    for _ in range(MOST_REMOVALS):
        folders = [folder for folder in folders if not _is_gone(folder)]
        if not folders:
            break
        time.sleep(0.1)


def _is_gone(folder: str) -> bool:
    """Removes the folder, read-only ones in it too; a process that is ending may still write."""
    with suppress(OSError):
        for *_, inside in os.fwalk(folder):
            with suppress(OSError):
                os.fchmod(inside, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    keep(sys.stdin)
