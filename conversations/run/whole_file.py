"""A file that is written whole or not at all: a kill leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path


def write_whole(file: Path, content: Iterable[bytes], *, mark: str = "") -> int:
    """Replaces `file` by `content`, and syncs it. Returns its size in bytes. Raises OSError.

    The new file is `FILE.new` until it is complete, `FILE.MARK.new` with a mark: writers of the
    same file at the same time need marks that differ. A device or pipe, such as /dev/null, is
    never replaced: that is an OSError.
    """
    _refuse_what_is_no_file(file)
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


def _refuse_what_is_no_file(file: Path) -> None:
    """Raises OSError if a file cannot take this place."""
    if not file.name:  # the root, or what an empty variable of a shell leaves
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if file.is_symlink() and os.readlink(file).startswith("/proc/"):  # as /dev/stdout is
        raise OSError(errno.EINVAL, "is a device or a pipe", str(file))
    with contextlib.suppress(FileNotFoundError):
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "is a device or a pipe", str(file))


def sync_folder(path: Path) -> None:
    """Syncs a folder's own entries: names of new files are on disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
