"""Import guards: what lets SGLang 0.5.5 be imported on a CPU whose kernels it does not ship.

SGLang imports two packages that have no build for such a machine: `sgl_kernel` (the published one
holds CUDA code only) and three modules of `vllm` (on a CPU without AMX). Neither is needed to
compute anything: each `for_*` folder holds a stand-in that imports, hands on SGLang's own
pure-torch classes, and raises when a kernel is called.

A stand-in never shadows the real package: its folder is used only when that package is not
installed, and then goes to the end of `sys.path`. Child processes started with the spawn method
inherit that path; for a process started as a command (`python -m sglang.launch_server`) give
`guard_paths()` in PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_GUARDED = ("sgl_kernel", "vllm")


def guard_paths() -> list[str]:
    """The folders to put on the import path here: one per package that is not installed."""
    here = Path(__file__).parent
    folders = {name: str(here / f"for_{name}") for name in _GUARDED}
    return [
        folder
        for name, folder in folders.items()
        if folder in sys.path or importlib.util.find_spec(name) is None
    ]


def install() -> None:
    """Appends what is missing to `sys.path`. Safe to call twice."""
    sys.path.extend(path for path in guard_paths() if path not in sys.path)
