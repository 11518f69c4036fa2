"""Checks whose packages Python imports.

Users have folders named `agent`, `tools` and `conversations` too. Invariant: once `agent` is
imported, `conversations` and `tools` are known to lie beside it; otherwise the import failed with
one line that names the folder in the way. The check imports nothing.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAMES = ("agent", "conversations", "tools")
ROOT = Path(__file__).resolve().parents[1]

EXTRAS = {
    "PIL": "images",
    "httptools": "sandbox",
    "mathruler": "geo3k",
    "mcp": "mcp",
    "numpy": "evidence",
    "opentelemetry": "otel",
    "packaging": "sandbox",
    "psutil": "sandbox",
    "pyarrow": "parquet",
    "pylatexenc": "geo3k",
    "ray": "ray",
    "reasoning_gym": "tasks",
    "safetensors": "evidence",
    "sympy": "geo3k",
    "tantivy": "search",
    "transformers": "transformers",
}
"""Which of the project's extras brings a package, by import name."""

ENGINE_PACKAGES = ("sglang", "tensordict", "torch", "verl")
"""What the engine in process needs: the extra `cuda`, or `make demo` on a CPU machine."""


def not_installed(error: ModuleNotFoundError) -> str:
    """What is missing and how to get it, in one line; empty if it is a part of a package."""
    if not error.name or "." in error.name or error.name in NAMES:
        return ""
    return f"the Python package {error.name!r} is not installed; {how_to_install(error.name)}"


def how_to_install(module: str) -> str:
    """What to type to get a missing module, for the end of an error line."""
    top = module.split(".")[0]
    if top in EXTRAS:
        return f"pip install 'turntrace[{EXTRAS[top]}]'"
    if top in ENGINE_PACKAGES:
        return (
            "the engine in process needs it: pip install 'turntrace[cuda]' on a GPU machine, "
            "`make demo` in a checkout on a CPU; `rollout.name: sglang_server` needs neither"
        )
    return "set this environment up again: `make demo` in a checkout, or pip install turntrace"


def check_imports() -> None:
    """Raises ImportError if one of our packages would be imported from elsewhere."""
    for name in NAMES:
        location = _location(_spec(name))
        if location != (ROOT / name).resolve():
            raise ImportError(
                f"{location or name} hides turntrace's own package {name!r} ({ROOT / name}) from "
                f"Python: rename yours (my_{name}, for example), or keep its folder out of "
                "PYTHONPATH and start from elsewhere"
            )


def local_folders(folder: Path) -> list[str]:
    """A line for each package or module that hides ours from a script started in `folder`."""
    if (folder / "agent" / Path(__file__).name).is_file():
        return []  # a checkout of ours
    specs = {name: PathFinder.find_spec(name, [str(folder)]) for name in NAMES}
    # A folder without __init__.py has no loader: an installed package wins over it.
    hiding = {name: _location(spec) for name, spec in specs.items() if spec and spec.loader}
    return [
        f"scripts started in this folder import {path} instead of turntrace's own package "
        f"{name!r}; rename it (my_{name}, for example)"
        for name, path in hiding.items()
    ]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # imported already, without a spec
        return None


def _location(spec: ModuleSpec | None) -> Path | None:
    """The folder or file that the import would read; None if there is none."""
    if spec is None:
        return None
    if spec.origin is None:
        return Path(next(iter(spec.submodule_search_locations or ["."]))).resolve()
    origin = Path(spec.origin)
    return (origin.parent if origin.name == "__init__.py" else origin).resolve()
