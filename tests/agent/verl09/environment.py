"""An environment for another verl than 0.6.1: the packages in which it differs, laid over the
tests' own.

One folder of `.cache/verl` for each requirements file, named by its content and the Python,
installed once: 207 MB and about 20 s for 0.9.1. It stands first on PYTHONPATH; whatever is not in
it comes from the environment of the tests.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT, made_whole

HERE = Path(__file__).parent


def variables(version: str) -> dict[str, str]:
    """This process's environment variables, for a child that is to see that verl."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(_packages(version))])}


def _packages(version: str) -> Path:
    requirements = HERE / f"verl-{version}.txt"
    content = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    made = (
        ROOT
        / ".cache"
        / "verl"
        / f"{version}-{content}-py{sys.version_info.major}.{sys.version_info.minor}"
    )
    if not made.is_dir():
        with made_whole(made) as fresh:
            _install(requirements, fresh)
    return made


def _install(requirements: Path, target: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    subprocess.run(
        [*pip, "--target", target, "--requirement", requirements], check=True, timeout=600
    )
