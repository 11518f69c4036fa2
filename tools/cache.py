"""What is built once and kept: a folder that appears whole or not at all, also when several processes want it at once."""

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
    """Where built things are kept: `$TURNTRACE_CACHE`, else `turntrace` in the user's cache directory."""
    if own := os.environ.get("TURNTRACE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turntrace"


def build_folder(
    target: Path,
    is_good: Callable[[Path], bool],
    write: Callable[[Path], None],
    while_waiting: Callable[[], None] = lambda: None,
) -> bool:
    """Has `write` make the folder `target` unless it is there and good; returns whether it was written.

    `write` is given a path beside it, and what it makes there is moved into place when it is whole; those who have a folder
    open that is no longer good keep it. Whatever ends `write`, Ctrl-C included, leaves what was there before.
    `while_waiting` is called ten times a second while another process makes the folder; what it raises ends the waiting.
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
    """One builder of a folder at a time. The lock lies in the cache: where the folder goes, only the folder should appear."""
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
