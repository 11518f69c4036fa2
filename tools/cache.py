"""Folders that are built once and kept.

Invariant: a folder appears complete or not at all, also if several processes want it at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_POLL_S = 0.1


def cache_dir() -> Path:
    """Where built folders are kept: `$TURNTRACE_CACHE`, else `turntrace` in the user's cache."""
    if own := os.environ.get("TURNTRACE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turntrace"


def build_folder(
    target: Path,
    is_good: Callable[[Path], bool],
    write: Callable[[Path], None],
    while_waiting: Callable[[], None] = lambda: None,
) -> bool:
    """Builds the folder `target` unless it exists and is good. Returns whether it was built.

    `write` gets a path beside `target`; the folder it makes is moved into place when complete.
    A process that has an outdated folder open keeps it. If `write` fails, Ctrl-C included, the
    folder is as it was before. While another process builds the folder, `while_waiting` is called
    ten times a second; an exception from it ends the wait.
    """
    if is_good(target):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target, while_waiting):
        if is_good(target):
            return False
        scratch, old = (target.with_name(f".{target.name}.{end}") for end in ("building", "old"))
        try:
            for leftover in (scratch, old):  # of a process that was killed: only one holds the lock
                shutil.rmtree(leftover, ignore_errors=True)
            write(scratch)
            if target.exists():
                target.rename(old)
            scratch.rename(target)
        finally:
            for leftover in (scratch, old):
                shutil.rmtree(leftover, ignore_errors=True)
    return True


@contextmanager
def _locked(target: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """One builder of a folder at a time.

    The lock file is in the cache, so that beside the folder nothing else appears.
    """
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]).open(
        "w"
    ) as file:
        while not _try_lock(file):
            while_waiting()
            time.sleep(_POLL_S)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
