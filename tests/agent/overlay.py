"""Environments for other versions of a package: the packages that differ, laid over the tests' own.

One folder of `.cache/overlays` for each requirements file, named by its content and the Python,
installed once. It stands first on PYTHONPATH; everything that is not in it comes from the
environment of the tests. For SGLang 0.5.23 that is 430 MB, 20 s and 6 s of CPU: what is imported
is compiled then, not the rest. `make test-stacks` installs all of them first, with
`python -m tests.agent.overlay`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT, made_whole

NEEDED = (
    ROOT / "tests" / "agent" / "engines" / "sglang-0.5.23.txt",
    ROOT / "tests" / "agent" / "verl09" / "verl-0.9.1.txt",
    ROOT / "tests" / "agent" / "verl09" / "verl-0.8.0.txt",
    ROOT / "tests" / "agent" / "gateway" / "clients.txt",
)
"""The requirements of `make test-stacks`."""


def variables(requirements: Path) -> dict[str, str]:
    """This process's environment variables, for a child that is to see those packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(_packages(requirements))])}


def _packages(requirements: Path) -> Path:
    content = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    made = ROOT / ".cache" / "overlays" / f"{requirements.stem}-{content}-{python}"
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other process may be installing it
        if not made.is_dir():
            with made_whole(made) as fresh:
                _install(requirements, fresh)
    return made


def _install(requirements: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-compile", "--target", target, "--requirement", requirements]
    subprocess.run(command, check=True, timeout=600)


if __name__ == "__main__":
    for needed in NEEDED:
        _packages(needed)
