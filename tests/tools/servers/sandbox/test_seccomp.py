"""Rule: the filter answers every call as its list says.

A small interpreter of its instructions runs it here.
"""

from __future__ import annotations

import errno
import struct

import pytest

from tools.servers.sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
X86_64, AARCH64 = (0, 0xC000003E), (1, 0xC00000B7)


def refused(code: int) -> int:
    return 0x00050000 | code


def verdict(
    machine: tuple[int, int], number: int, first: int = 0, architecture: int | None = None
) -> int:
    """What the kernel would return, from man 2 seccomp's and the BPF machine's definitions."""
    column, own = machine
    data = struct.pack(
        "<IIQ6Q", number, own if architecture is None else architecture, 0, first, 0, 0, 0, 0, 0
    )
    program, at, loaded = list(seccomp._instructions(column, own)), 0, 0
    while True:
        code, if_so, if_not, operand = program[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            (loaded,) = struct.unpack_from("<I", data, operand)
        else:
            so = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[
                code
            ]
            at += if_so if so else if_not


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_every_listed_call_is_refused(machine: tuple[int, int]) -> None:
    for calls, code in ((seccomp._REFUSED, errno.EPERM), (seccomp._MISSING, errno.ENOSYS)):
        for name, numbers in calls.items():
            if (number := numbers[machine[0]]) is not None:
                assert verdict(machine, number) == refused(code), name


@pytest.mark.parametrize(
    ("machine", "calls"),
    [(X86_64, (0, 1, 2, 9, 39, 57, 59, 231, 257, 456)), (AARCH64, (56, 63, 64, 93, 221, 222, 456))],
)
def test_everyday_calls_are_allowed(machine: tuple[int, int], calls: tuple[int, ...]) -> None:
    assert {verdict(machine, number) for number in calls} == {ALLOW}


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_another_architectures_calls_kill_and_newer_ones_are_missing(
    machine: tuple[int, int],
) -> None:
    assert verdict(machine, 1, architecture=0x40000003) == KILL
    for number in (457, 9999, 0x40000000 + 1, 0xFFFFFFFF):
        assert verdict(machine, number) == refused(errno.ENOSYS)


@pytest.mark.parametrize(
    ("machine", "clone", "socket", "prlimit"), [(X86_64, 56, 41, 302), (AARCH64, 220, 198, 261)]
)
def test_what_depends_on_the_first_argument(
    machine: tuple[int, int], clone: int, socket: int, prlimit: int
) -> None:
    assert verdict(machine, clone, 0x003D0F00) == ALLOW  # a thread
    for flag in (
        0x00020000,
        0x02000000,
        0x04000000,
        0x08000000,
        0x10000000,
        0x20000000,
        0x40000000,
    ):
        assert verdict(machine, clone, flag | 17) == refused(errno.EPERM)
    for family in (1, 2, 10, 1 << 32 | 1):  # The kernel takes the low half, and so does the filter.
        assert verdict(machine, socket, family) == ALLOW
    for family in (0, 3, 16, 17, 38, 40, 1 << 32 | 16, 0xFFFFFFFF):
        assert verdict(machine, socket, family) == refused(errno.EAFNOSUPPORT)
    assert (verdict(machine, prlimit, 0), verdict(machine, prlimit, 1)) == (
        ALLOW,
        refused(errno.EPERM),
    )


def test_the_program_is_what_the_kernel_takes() -> None:
    program = seccomp.filter_program()
    assert len(program) % 8 == 0
    assert len(program) // 8 <= 4096


def test_a_machine_without_a_list_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match=r"riscv64.*x86_64"):
        seccomp.filter_program()
