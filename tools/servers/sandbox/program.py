"""One program: what it is given, and what any way of shutting it in has to offer."""

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
    """The sandbox, not the program, failed: the program never ran, or how it ended is not known."""


@dataclass(frozen=True, slots=True)
class Program:
    """`command` runs in the working folder, where `files` lie {path: base64}; `fetch` names files wanted from there after it.

    `timeout_s` bounds it all, and, a little later, the CPU time of each process. `memory_mib` bounds the address space of
    each process or, where `reserves_memory` says that the language's runtime reserves far more than it uses, its data; and
    the memory of all processes in sum.
    """

    command: tuple[str, ...]
    files: dict[str, str]
    fetch: tuple[str, ...]
    timeout_s: float
    memory_mib: int
    reserves_memory: bool = False

    @property
    def limits(self) -> dict[str, int]:
        """By the name of the kernel's resource, RLIMIT_ left out."""
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
        """Of the process from which all of the program descends; None while that is not known, or once it is gone."""

    def kill(self) -> None:
        """All of it, at once; also when it is already dead, or not yet there."""

    def pause(self) -> None:
        """Stops all of it, where that can be done."""

    def resume(self) -> None:
        """Lets it go on."""

    async def ended(self) -> int | None:
        """When all of it is dead: its exit code, None where it was killed from outside. Raises SandboxError."""

    def close(self) -> None:
        """Lets go of what we hold of it. It must be dead."""


class Launcher(Protocol):
    """A way to start programs shut in."""

    async def start(self, program: Program, streams: Streams, group: Group) -> Running:
        """Raises SandboxError or OSError; then nothing was started."""

    async def close(self) -> None:
        """Frees what all programs share. Safe to call twice."""
