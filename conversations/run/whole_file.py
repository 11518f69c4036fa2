"""A file that is written whole or not at all: a kill leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(file: Path, content: Iterable[bytes], *, mark: str = "") -> int:
    """Replaces `file` by `content`, and syncs it. Returns its size in bytes. Raises OSError.

    The new file is `FILE.new` until it is complete, `FILE.MARK.new` with a mark: writers of the
    same file at the same time need marks that differ.
    """
    fresh = file.with_name(f"{file.name}{mark and '.'}{mark}.new")
    try:
        with fresh.open("wb") as out:
            out.writelines(content)
            size = out.tell()
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(file.parent)
    return size


def sync_folder(path: Path) -> None:
    """Syncs a folder's own entries: names of new files are on disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
