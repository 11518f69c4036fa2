"""Environments for other versions of a package: the packages that differ, laid over the tests' own.

One folder of `.cache/overlays` for each requirements file, named by its content and the Python,
installed once. It stands first on PYTHONPATH; everything that is not in it comes from the
environment of the tests. For verl 0.9.1 that is 207 MB and about 20 s, for SGLang 0.5.23 about
600 MB.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT, made_whole


def variables(requirements: Path) -> dict[str, str]:
    """This process's environment variables, for a child that is to see those packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(_packages(requirements))])}


def _packages(requirements: Path) -> Path:
    content = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    made = ROOT / ".cache" / "overlays" / f"{requirements.stem}-{content}-{python}"
    if not made.is_dir():
        with made_whole(made) as fresh:
            _install(requirements, fresh)
    return made


def _install(requirements: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--target", target, "--requirement", requirements]
    subprocess.run(command, check=True, timeout=600)
