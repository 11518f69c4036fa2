"""The memory of all processes of a program together: bounded by a cgroup, else watched.

The kernel bounds a cgroup exactly: scratch files, page tables and shared pages count, and a program
that exceeds the limit is killed. The watch adds up the memory of the processes ten times a second;
it misses what is faster, and what is not in a process (scratch files).

Programs use a group one after the other, because the kernel is slow to forget a removed group. Its
folder ends with the server. A server that was killed leaves empty ones, which the next one removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
OVERHEAD_MIB = 16  # of the sandbox's own process and the kernel's tables, in a program's group

_PREFIX = "turntrace-sandbox-"
_WATCH_S = 0.1
_TRIED_MIB, _TRY_S = 64, 10
_PATIENCE, _AGAIN_S = 100, 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class _Version:
    """File names of one cgroup version.

    limits: files and what to write there, in order
    events: the file that counts OOM kills
    """

    name: str
    limits: tuple[tuple[str, str], ...]
    events: str


# In v1 the limit with swap is never below the one without. A kernel that does not count swap has
# no file for it.
_V1 = _Version(
    "cgroup v1",
    (
        ("memory.memsw.limit_in_bytes", "-1"),
        ("memory.limit_in_bytes", "{}"),
        ("memory.memsw.limit_in_bytes", "{}"),
    ),
    "memory.oom_control",
)
_V2 = _Version("cgroup v2", (("memory.max", "{}"), ("memory.swap.max", "0")), "memory.events")
_NEEDED = ("memory.limit_in_bytes", "memory.max")


@dataclass(slots=True)
class Group:
    """One program's group.

    join_fd: a process that writes 0 here joins, with its later children; None: no group
    """

    join_fd: int | None = None
    events: Path | None = None
    kills_before: int = 0

    def join(self) -> None:
        """Puts this process into the group, if there is one. Raises OSError."""
        if self.join_fd is not None:
            os.write(self.join_fd, b"0")

    def kills(self) -> int:
        """How many of the program's processes the kernel has killed over the limit."""
        return _field(self.events, "oom_kill") - self.kills_before if self.events is not None else 0


class Groups:
    """Groups below `parent`, a folder of the cgroup tree; None: groups cannot be made."""

    def __init__(self, parent: Path | None, version: _Version = _V1) -> None:
        self.parent = parent
        self._version = version
        self._free: list[Path] = []
        self._numbers = itertools.count()

    def __str__(self) -> str:
        return self._version.name if self.parent else "watched"

    @contextlib.asynccontextmanager
    async def group(self, limit_mib: int) -> AsyncIterator[Group]:
        """A group for one program, which must be dead at the end of the block. Raises OSError."""
        if self.parent is None:
            yield Group()
            return
        folder = await self._limited(self.parent, (limit_mib + OVERHEAD_MIB) * MIB)
        try:
            fd = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                events = folder / self._version.events
                yield Group(fd, events, _field(events, "oom_kill"))
            finally:
                os.close(fd)
        finally:
            await asyncio.shield(_emptied(folder))
            self._free.append(folder)

    async def close(self) -> None:
        """Removes all groups; no program may be running."""
        while self._free:
            await _removed(self._free.pop())

    async def _limited(self, parent: Path, limit_bytes: int) -> Path:
        """A used group if the limit can be set there, else a new one."""
        while self._free:
            folder = self._free.pop()
            try:
                self._limit(folder, limit_bytes)
                return folder
            except OSError:
                await _removed(folder)
        folder = parent / f"{_PREFIX}{os.getpid()}-{next(self._numbers)}"
        folder.mkdir()
        self._free.append(folder)
        self._limit(folder, limit_bytes)
        return self._free.pop()

    def _limit(self, folder: Path, limit_bytes: int) -> None:
        for name, value in self._version.limits:
            if name in _NEEDED or (folder / name).exists():
                (folder / name).write_text(value.format(limit_bytes))


async def working_groups(identity: dict[str, Any]) -> Groups:
    """The nearest place where a group can be made, limited and entered; else `Groups(None)`.

    identity: the user of programs, as subprocess takes it
    """
    for groups in _candidates():
        _sweep(groups)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            async with groups.group(_TRIED_MIB) as group:
                _try(group, identity)
            return groups
        await groups.close()
    return Groups(None)


def _try(group: Group, identity: dict[str, Any]) -> None:
    subprocess.run(
        ["/bin/sh", "-c", ":"], check=True, preexec_fn=group.join, timeout=_TRY_S, **identity
    )


def _candidates() -> Iterator[Groups]:
    for own, root, version in _own_groups():
        for folder in (own, *own.parents):
            if version is _V1 or "memory" in _text(folder / "cgroup.subtree_control").split():
                yield Groups(folder, version)
            if folder == root:
                break


def _own_groups() -> Iterator[tuple[Path, Path, _Version]]:
    """For each hierarchy: our own group's folder, the root that this process sees, the version."""
    lines = [line.split(":", 2) for line in _text(Path("/proc/self/cgroup")).splitlines()]
    paths = {
        controller: path for _, controllers, path in lines for controller in controllers.split(",")
    }
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        (top, point), (kind, _, options) = before.split()[3:5], after.split()[:3]
        version, controller = (_V2, "") if kind == "cgroup2" else (_V1, "memory")
        if (
            kind not in ("cgroup", "cgroup2")
            or controller not in paths
            or (version is _V1 and "memory" not in options.split(","))
        ):
            continue
        inside = os.path.relpath(paths[controller], top)
        yield Path(point) / ("" if inside.startswith("..") else inside), Path(point), version


def _sweep(groups: Groups) -> None:
    """Removes the groups of killed servers and kills what is in them; running servers' stay."""
    for folder in groups.parent.glob(f"{_PREFIX}*") if groups.parent else ():
        if not os.path.exists(f"/proc/{folder.name.removeprefix(_PREFIX).split('-')[0]}"):
            _kill_members(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _kill_members(folder: Path) -> None:
    for pid in _text(folder / "cgroup.procs").split():
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)


async def _emptied(folder: Path) -> None:
    """Kills whatever is left in a dead program's group. Raises OSError if that does not help."""
    for _ in range(_PATIENCE):
        if not (folder / "cgroup.procs").read_bytes():
            return
        _kill_members(folder)
        await asyncio.sleep(_AGAIN_S)
    raise OSError(f"a process stays in {folder}")


async def _removed(folder: Path) -> None:
    for _ in range(_PATIENCE):
        if _is_removed(folder):
            return
        await asyncio.sleep(_AGAIN_S)
    raise OSError(f"{folder} cannot be removed")


def _is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True


# ---------------------------------------------------------------------- without a cgroup


async def watch(
    first: Callable[[], int | None], limit_mib: int, exceeded: Callable[[], None]
) -> None:
    """Calls `exceeded` once a process and its descendants hold more than the limit.

    first: returns the process's id, or None while there is none
    """
    while True:
        await asyncio.sleep(_WATCH_S)
        pid = first()
        pids = list(_family(pid)) if pid is not None else []
        limit_bytes = (limit_mib + OVERHEAD_MIB) * MIB
        # Resident pages count shared ones for each process, but are cheap to read.
        if (
            sum(map(_resident_bytes, pids)) > limit_bytes
            and sum(map(_proportional_bytes, pids)) > limit_bytes
        ):
            return exceeded()


def _family(pid: int) -> Iterator[int]:
    yield pid
    for thread in _names(f"/proc/{pid}/task"):
        for child in _text(Path(f"/proc/{pid}/task/{thread}/children")).split():
            yield from _family(int(child))


def _resident_bytes(pid: int) -> int:
    return int((_text(Path(f"/proc/{pid}/statm")).split() or "00")[1]) * _PAGE_BYTES


def _proportional_bytes(pid: int) -> int:
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text(path: Path) -> str:
    """The text of a kernel's file; empty if the file or its process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(path: Path, name: str) -> int:
    return next(
        (int(line.split()[1]) for line in _text(path).splitlines() if line.split()[:1] == [name]), 0
    )
