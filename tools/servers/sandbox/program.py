"""One program: what it gets, and what any way to isolate it must offer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tools.servers.sandbox.descriptors import Streams
from tools.servers.sandbox.memory import MIB, Group

SCRATCH_BYTES = 128 * MIB
SHARED_MEMORY_BYTES = 64 * MIB
MAX_SCRATCH_FILES = 16384
MAX_FILE_BYTES = 128 * MIB
MAX_FETCH_BYTES = 32 * MIB  # of one fetched file
MAX_PROCESSES = 64
MAX_OPEN_FILES = 256

_LONGEST_S = 1e9


class SandboxError(Exception):
    """The sandbox failed, not the program: it never ran, or how it ended is unknown."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command and its limits.

    command: runs in the working folder
    files: there, {path: base64}
    fetch: names of files that are wanted from there afterwards
    timeout_s: of all of it and, a little later, of each process's CPU time
    memory_mib: of all processes together, and of each process's address space
    reserves_memory: the language's runtime reserves far more address space than it uses; the limit
        then bounds each process's data
    """

    command: tuple[str, ...]
    files: dict[str, str]
    fetch: tuple[str, ...]
    timeout_s: float
    memory_mib: int
    reserves_memory: bool = False

    @property
    def limits(self) -> dict[str, int]:
        """Limits by the name of the kernel's resource, without RLIMIT_."""
        return {
            "CORE": 0,
            "CPU": math.ceil(min(self.timeout_s, _LONGEST_S)) + 1,
            "DATA" if self.reserves_memory else "AS": self.memory_mib * MIB,
            "FSIZE": MAX_FILE_BYTES,
            "NOFILE": MAX_OPEN_FILES,
            "NPROC": MAX_PROCESSES,
        }


class Running(Protocol):
    """A program that has been started."""

    @property
    def pid(self) -> int | None:
        """The process from which all of the program descends; None if unknown or gone."""

    def kill(self) -> None:
        """Kills all of it; also if it is already dead, or not started yet."""

    def pause(self) -> None:
        """Stops all of it, if that is possible."""

    def resume(self) -> None:
        """Continues it."""

    async def ended(self) -> int | None:
        """Waits until all of it is dead. Returns its exit code, None if it was killed.

        Raises SandboxError.
        """

    def close(self) -> None:
        """Frees what the server holds of it. It must be dead."""


class Launcher(Protocol):
    """A way to start isolated programs."""

    async def start(self, program: Program, streams: Streams, group: Group) -> Running:
        """Starts one. Raises SandboxError or OSError if nothing was started."""

    async def close(self) -> None:
        """Frees what all programs share. Safe to call twice."""
