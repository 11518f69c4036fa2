"""A folder that exists complete or not at all: it is renamed from a hidden one at the very end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from conversations.errors import ConversationsError


@contextlib.contextmanager
def new_folder(out: Path, error_class: type[ConversationsError]) -> Iterator[Path]:
    """A folder to write into. It becomes `out` if the block succeeds, and is removed otherwise.

    Raises `error_class` if `out` exists and is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error_class(f"{out} is there already; move it away, or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise error_class(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.rename(out)
    except OSError as error:
        raise error_class(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
