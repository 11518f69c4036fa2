"""The system calls that no program in the sandbox may make, as the filter that the kernel takes.

A deny list: what honest programs need (processes, threads, files, AF_UNIX and loopback sockets) is
allowed; what reaches into the kernel's rarer parts is refused, and so is every call newer than this
list. The filter checks the architecture first, because the numbers mean other calls on another one.

Numbers: Linux's arch/x86/entry/syscalls/syscall_64.tbl, and include/uapi/asm-generic/unistd.h,
which aarch64 uses. The program: classic BPF over `struct seccomp_data`, man 2 seccomp.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterator

# name: (x86_64, aarch64); None if the architecture lacks it. From 424 on the numbers are the same.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # the kernel's larger doors
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "fanotify_init": (300, 262), "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18),
    "personality": (135, 92), "modify_ldt": (154, None), "memfd_secret": (447, 447),
    # keys belong to a user, and every program runs as the same one
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip

# Answered as if the kernel lacked them, so that libraries do without. clone3 hides its flags from a
# filter; memory files and System V's memory, queues and semaphores outlive their process, or are
# not part of any process's memory.
_MISSING: dict[str, tuple[int | None, int | None]] = {
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "memfd_create": (319, 279), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
_NEWEST = 456  # futex_requeue

# Checked by an argument: a flag, whether the process is another, the address family.
_CLONE, _PRLIMIT = (56, 220), (302, 261)  # clone; prlimit64
_SOCKETS = ((41, 198), (53, 199))  # socket and socketpair
_NEW_NAMESPACES = 0x7E020000  # Every CLONE_NEW* that clone takes.
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6

# column above, AUDIT_ARCH_*
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets; both architectures are little-endian, so the low half is first.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000


def filter_program() -> bytes:
    """The filter for this machine, an array of `struct sock_filter`.

    Raises OSError if its architecture is unknown.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(
            f"no system call filter for {machine}; there is one for {' and '.join(_ARCHITECTURES)}"
        )
    column, architecture = _ARCHITECTURES[machine]
    return b"".join(
        struct.pack("=HBBI", *instruction) for instruction in _instructions(column, architecture)
    )


def _instructions(column: int, architecture: int) -> Iterator[tuple[int, int, int, int]]:
    """(operation, how many to skip if true, if false, operand).

    The x32 calls of x86_64 start at 2**30, and so count as newer than the newest.
    """
    yield (_LOAD, 0, 0, _ARCHITECTURE)
    yield from _if(_EQUAL, architecture, (_RETURN, 0, 0, _KILL_PROCESS), negated=True)
    yield (_LOAD, 0, 0, _NUMBER)
    yield from _if(_AT_LEAST, _NEWEST + 1, _refuse(errno.ENOSYS))
    for calls, code in ((_REFUSED, errno.EPERM), (_MISSING, errno.ENOSYS)):
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                yield from _if(_EQUAL, number, _refuse(code))
    yield from _if(
        _EQUAL, _CLONE[column],
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        *_if(_ANY_BIT, _NEW_NAMESPACES, _refuse(errno.EPERM)),
        (_RETURN, 0, 0, _ALLOW),
    )  # fmt: skip
    yield from _if(
        _EQUAL, _PRLIMIT[column],
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        *_if(_EQUAL, 0, (_RETURN, 0, 0, _ALLOW)),
        _refuse(errno.EPERM),
    )  # fmt: skip
    allowed = [
        part for family in _FAMILIES for part in _if(_EQUAL, family, (_RETURN, 0, 0, _ALLOW))
    ]
    for numbers in _SOCKETS:
        yield from _if(
            _EQUAL,
            numbers[column],
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            *allowed,
            _refuse(errno.EAFNOSUPPORT),
        )
    yield (_RETURN, 0, 0, _ALLOW)


def _if(
    test: int, operand: int, *then: tuple[int, int, int, int], negated: bool = False
) -> Iterator[tuple[int, int, int, int]]:
    """Does `then` if the loaded value passes the test (`negated`: fails it), else skips it."""
    yield (test, len(then), 0, operand) if negated else (test, 0, len(then), operand)
    yield from then


def _refuse(code: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | code)
