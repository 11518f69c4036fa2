"""The languages of this machine, by SandboxFusion's names: how each is compiled and run.

Only what was seen working is offered: `tried` runs at the server's start, in the sandbox, and must
print 1.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM_PATH = "/usr/bin:/bin"
WORK = "/tmp"  # inside the sandbox: the working folder, a tmpfs of its own
BINARY = "main.out"

_CPP = '#include <stdio.h>\nint main() { puts("1"); }'


@dataclass(frozen=True, slots=True)
class Language:
    """`compile` is a command that makes `BINARY` of the code; if there is one, `run` is the binary.

    `reserves_memory`: the runtime reserves far more address space than it uses.
    """

    name: str
    file: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    tried: str = "print(1)"
    reserves_memory: bool = False


def python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def candidates() -> Iterator[Language]:
    """Python, bash and C++, if the machine has their commands."""
    yield Language("python", "main.py", (python(), f"{WORK}/main.py"))
    if bash := shutil.which("bash", path=SYSTEM_PATH):
        yield Language("bash", "main.sh", (bash, f"{WORK}/main.sh"), tried="echo 1")
    if compiler := shutil.which("g++", path=SYSTEM_PATH):
        command = (compiler, "-O2", "-std=c++17", "-o", BINARY, "main.cpp")
        binary = (f"{WORK}/{BINARY}",)
        yield Language("cpp", "main.cpp", binary, command, _CPP, reserves_memory=True)
