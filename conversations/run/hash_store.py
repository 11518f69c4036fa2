"""A folder of files that are named by the SHA-256 of their content.

Invariant: a file that is there is whole, and a file is written once; writing it again does nothing.
What is read is checked against its name, so the folder may come from anybody.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path

from conversations.errors import RunFolderError
from conversations.run.whole_file import write_whole

_NAME = re.compile(r"[0-9a-f]{64}")


def content_hash(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


class HashStore:
    """The files `SHA256SUFFIX` of `folder`, which is made when the first one is written.

    Any thread and any process may use it.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder, self.suffix = folder, suffix

    def path(self, sha256: str) -> Path:
        """Where the file of that hash is, or would be. Raises RunFolderError if it is no hash."""
        if not _NAME.fullmatch(sha256):
            raise RunFolderError(f"{sha256[:80]!r} is no SHA-256 in hex")
        return self.folder / f"{sha256}{self.suffix}"

    def put(self, data: bytes) -> str:
        """Writes the file, synced, unless it is there; returns its hash. Raises RunFolderError."""
        sha256 = content_hash(data)
        file = self.path(sha256)
        if file.is_file() and file.stat().st_size == len(data):
            return sha256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, (data,), mark=uuid.uuid4().hex)
        except OSError as error:
            raise RunFolderError(
                f"{file} cannot be written: {error.strerror}; make room and --resume"
            ) from error
        return sha256

    def read(self, sha256: str, *, most: int) -> bytes:
        """The content of at most `most` bytes.

        Raises RunFolderError if there is no such file, it is larger, or it is not what its name
        says.
        """
        file = self.path(sha256)
        if not file.is_file():  # a named pipe would wait for its writer
            raise RunFolderError(f"{file} is not there")
        try:
            with file.open("rb") as opened:
                data = opened.read(most + 1)
        except OSError as error:
            raise RunFolderError(f"{file} cannot be read: {error.strerror}") from error
        if len(data) > most:
            raise RunFolderError(f"{file} has more than {most} bytes")
        if content_hash(data) != sha256:
            raise RunFolderError(f"{file} is not what its name says: it was changed")
        return data
