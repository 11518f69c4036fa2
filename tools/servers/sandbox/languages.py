"""The languages of this machine, by SandboxFusion's names: how each is run, and compiled where it has to be.

Offered is only what was seen working: `tried` is run at the server's start, in the sandbox, and must print 1.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM_PATH = "/usr/bin:/bin"
WORK = "/tmp"  # Inside the sandbox: the working folder, a tmpfs of its own.
BINARY = "main.out"


@dataclass(frozen=True, slots=True)
class Language:
    """`compile` is a command that makes `BINARY` of the code; where there is one, `run` is the binary.

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
    """Every language whose command is on the machine."""
    yield Language("python", "main.py", (python(), f"{WORK}/main.py"))
    for language in _TABLE:
        first = (language.compile or language.run)[0]
        if found := shutil.which(first, path=SYSTEM_PATH):
            yield _located(language, found)


def _located(language: Language, command: str) -> Language:
    if language.compile:
        return Language(
            language.name,
            language.file,
            language.run,
            (command, *language.compile[1:]),
            language.tried,
            language.reserves_memory,
        )
    run = (command, *language.run[1:], f"{WORK}/{language.file}")
    return Language(language.name, language.file, run, (), language.tried, language.reserves_memory)


_C = '#include <stdio.h>\nint main() { puts("1"); }'

_TABLE = (
    Language("bash", "main.sh", ("bash",), tried="echo 1"),
    Language("nodejs", "main.js", ("node",), tried="console.log(1)", reserves_memory=True),
    Language("perl", "main.pl", ("perl",), tried='print "1\\n"'),
    Language("ruby", "main.rb", ("ruby",), tried="puts 1"),
    Language("lua", "main.lua", ("lua",)),
    Language("php", "main.php", ("php",), tried='<?php echo "1\\n";'),
    Language("R", "main.R", ("Rscript",), tried="cat('1\\n')"),
    Language(
        "cpp",
        "main.cpp",
        (f"{WORK}/{BINARY}",),
        ("g++", "-O2", "-std=c++17", "-o", BINARY, "main.cpp"),
        tried=_C,
        reserves_memory=True,
    ),
)
