"""A program's input and output: files in memory, and pipes that are read as they fill.

Nothing of a request is ever on a disk. A program that prints without end neither fills the server's
memory nor blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import Callable

MAX_OUTPUT_BYTES = 4 << 20  # of stdout, and of stderr

_CHUNK_BYTES = 1 << 18


class Streams:
    """A program's stdin (a descriptor of the caller's), stdout, stderr, and fetched files.

    overflown: called when it prints too much
    """

    def __init__(
        self, stack: contextlib.ExitStack, stdin: int, overflown: Callable[[], None]
    ) -> None:
        self.stdin = stdin
        self.stdout, self.stderr = Drain(overflown), Drain(overflown)
        self.fetched = memory_file(stack)
        for drain in (self.stdout, self.stderr):
            stack.callback(drain.close)

    def close_write_ends(self) -> None:
        """Closes ours, once the program has its own."""
        self.stdout.close_write_end()
        self.stderr.close_write_end()

    async def end(self) -> None:
        """Returns when all is read and no process can print any more."""
        await self.stdout.end()
        await self.stderr.end()

    def fetched_files(self) -> dict[str, str]:
        """The fetched files, {path: base64}.

        The program may have written here as well: anything that is not in our form is dropped.
        """
        with open(self.fetched, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read()
        try:
            found = json.loads(content or b"{}")
        except ValueError:
            return {}
        return (
            {str(name): text for name, text in found.items() if isinstance(text, str)}
            if isinstance(found, dict)
            else {}
        )


class Drain:
    """A pipe that is read as it fills. Keeps `most` bytes; calls `overflown` if there are more."""

    def __init__(self, overflown: Callable[[], None], most: int = MAX_OUTPUT_BYTES) -> None:
        self.kept = bytearray()
        self._overflown = overflown
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self.read)

    @property
    def write_fd(self) -> int:
        return self._write_fd

    def read(self) -> bool:
        """Reads some of what is there now. Returns whether there was any."""
        try:
            chunk = os.read(self._read_fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if len(self.kept) + len(chunk) > self._most:
            self._overflown()
        self.kept += chunk[: self._most - len(self.kept)]
        if not chunk:
            self._loop.remove_reader(self._read_fd)
            self._end.set_result(None)
        return bool(chunk)

    def take(self) -> bytes:
        """All that was written so far, or since the last `take`."""
        while not self._end.done() and self.read():
            pass
        taken, self.kept = bytes(self.kept), bytearray()
        return taken

    def close_write_end(self) -> None:
        """Closes ours; the pipe ends when the program has closed its own."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    async def end(self) -> None:
        """Returns when all is read and no process can write any more."""
        await asyncio.shield(self._end)

    def close(self) -> None:
        self.close_write_end()
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)


def memory_file(stack: contextlib.ExitStack) -> int:
    """A file without a name, which ends with the request."""
    fd = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def sealed_file(stack: contextlib.ExitStack, content: bytes) -> int:
    """A file in memory that cannot be changed or extended."""
    fd = memory_file(stack)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(
        fd,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
    )
    return fd
