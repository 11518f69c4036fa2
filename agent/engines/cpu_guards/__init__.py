"""Import guards: what lets SGLang be imported on a CPU whose kernels it does not ship.

SGLang imports packages that have no build for such a machine: `sgl_kernel` (the published one holds
CUDA code only) and, in 0.5.5, three modules of `vllm` (on a CPU without AMX). Neither is needed to
compute anything. Each `for_*` folder holds a stand-in that imports, hands on SGLang's own
pure-torch classes, and raises if a kernel is called. No stand-in may declare the operator
`sgl_kernel::convert_weight_packed`: SGLang would take it for a CPU with AMX.

A stand-in never shadows the real package: its folder is used only if that package is not installed,
and then goes to the end of `sys.path`. `for_torchvision` alone goes to the front, and only if the
installed torchvision is a CUDA build beside a CPU build of torch: it repairs the import of the real
package, which newer versions of SGLang need. Child processes started with the spawn method inherit
that path; for a process started as a command (`python -m sglang.launch_server`) give
`guard_paths()` in PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

_GUARDED = ("sgl_kernel", "vllm")
_CUDA_BUILD = r"""^cuda\b[^=\n]*=\s*['"]|^__version__ = '[^']*\+cu"""
"""In the version.py of torch, and of torchvision."""
_HERE = Path(__file__).parent
_TORCHVISION = str(_HERE / "for_torchvision")


def guard_paths() -> list[str]:
    """The folders to put on the import path here: one for each package that does not import."""
    folders = {name: str(_HERE / f"for_{name}") for name in _GUARDED}
    missing = [
        folder
        for name, folder in folders.items()
        if folder in sys.path or importlib.util.find_spec(name) is None
    ]
    return [*([_TORCHVISION] if _needs_torchvision() else []), *missing]


def install() -> None:
    """Puts the folders on `sys.path`. Safe to call twice."""
    for path in guard_paths():
        if path not in sys.path:
            sys.path.insert(0 if path == _TORCHVISION else len(sys.path), path)


def _needs_torchvision() -> bool:
    """Whether the installed torchvision is a CUDA build and torch is a CPU build."""
    if _TORCHVISION in sys.path:
        return True
    builds = {name: _cuda_of(name) for name in ("torch", "torchvision")}
    return builds["torch"] is False and builds["torchvision"] is True


def _cuda_of(package: str) -> bool | None:
    """Whether a package is a CUDA build, as its version.py says; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        return None
    text = (Path(folders[0]) / "version.py").read_text(encoding="utf-8")
    return re.search(_CUDA_BUILD, text, re.MULTILINE) is not None
