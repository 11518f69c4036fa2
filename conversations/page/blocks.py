"""Lines of JSON in deflated blocks: written to a temporary file, read back by number.

Invariant: a block is the base64 of one zlib stream, so no character of it means anything to HTML.
Neighbours in a run share prompt and tools: together they compress several times better.
"""

from __future__ import annotations

import base64
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

BLOCK_CHARACTERS = 256 << 10
"""The size at which a block is closed. Opening a trajectory inflates its whole block."""
THREADS = 2
LEVEL = 5


def deflated(text: str) -> bytes:
    """A text as base64 of its deflated UTF-8."""
    return base64.b64encode(zlib.compress(text.encode(), LEVEL))


class Blocks:
    """Blocks that are written, then read. `len()` counts the closed ones.

    Close it (or use `with`) to remove the file.
    """

    def __init__(self) -> None:
        # Closed by `close`.
        self._file: Any = tempfile.TemporaryFile(prefix="turntrace-page-")  # noqa: SIM115
        self._ends: list[int] = []
        self._open: list[str] = []
        self._held = 0
        self._closed_blocks = 0
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="turntrace-page")
        self._pending: deque[Future[bytes]] = deque()

    def add(self, lines: Sequence[str]) -> tuple[int, int]:
        """Adds lines that stay together. Returns their block and the first one's place in it."""
        place = (self._closed_blocks, len(self._open))
        self._open += lines
        self._held += sum(map(len, lines))
        if self._held >= BLOCK_CHARACTERS:
            self._close_block()
        return place

    def finish(self) -> None:
        """Closes the last block; all blocks can be read afterwards."""
        if self._open:
            self._close_block()
        while self._pending:
            self._write_one()
        self._file.flush()
        self._threads.shutdown()

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        """The bytes of all blocks so far, without those still being deflated."""
        return self._ends[-1] if self._ends else 0

    def read(self, number: int) -> bytes:
        """One block's base64, for any thread. Raises IndexError if there is none, ValueError after
        `close`.
        """
        if not 0 <= number < len(self._ends):
            raise IndexError(number)
        start = self._ends[number - 1] if number else 0
        return os.pread(self._file.fileno(), self._ends[number] - start, start)

    def __iter__(self) -> Iterator[bytes]:
        return (self.read(number) for number in range(len(self)))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._file.close()

    def _close_block(self) -> None:
        self._pending.append(self._threads.submit(deflated, "\n".join(self._open)))
        self._open, self._held, self._closed_blocks = [], 0, self._closed_blocks + 1
        if len(self._pending) > 2 * THREADS:
            self._write_one()

    def _write_one(self) -> None:
        block = self._pending.popleft().result()
        self._file.write(block)
        self._ends.append(self.size + len(block))
