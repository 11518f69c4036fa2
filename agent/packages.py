"""Whose packages Python imports: `agent`, `tools` and `conversations` are names that users' own folders bear.

Invariant: once `agent` is imported, `conversations` and `tools` are known to lie beside it; otherwise the import has
failed with one line that names the folder in the way. Nothing is imported to look.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAMES = ("agent", "conversations", "tools")
ROOT = Path(__file__).resolve().parents[1]

EXTRAS = {
    "httptools": "sandbox",
    "mathruler": "geo3k",
    "mcp": "mcp",
    "opentelemetry": "otel",
    "packaging": "sandbox",
    "pandas": "parquet",
    "psutil": "sandbox",
    "pyarrow": "parquet",
    "pylatexenc": "geo3k",
    "reasoning_gym": "tasks",
    "sympy": "geo3k",
    "tantivy": "search",
}
"""Which of the project's extras brings a package, by import name."""

ENGINE_PACKAGES = ("ray", "safetensors", "sglang", "tensordict", "torch", "verl")
"""What the engine in process needs: the extra `cuda`, or `make demo` on a CPU machine."""


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


def check() -> None:
    """Raises ImportError where one of our packages would be imported from elsewhere."""
    for name in NAMES:
        found = _location(_spec(name))
        if found != (ROOT / name).resolve():
            raise ImportError(
                f"{found or name} hides turntrace's own package {name!r} ({ROOT / name}) from Python: "
                f"rename yours (my_{name}, say), or keep its folder out of PYTHONPATH and start from elsewhere"
            )


def local_folders(folder: Path) -> list[str]:
    """A line for each package or module of the user's that a script started in `folder` would import instead of ours."""
    if (folder / "agent" / Path(__file__).name).is_file():
        return []  # a checkout of ours
    specs = {name: PathFinder.find_spec(name, [str(folder)]) for name in NAMES}
    # A folder without __init__.py has no loader, and gives way to an installed package.
    found = {name: _location(spec) for name, spec in specs.items() if spec and spec.loader}
    return [
        f"scripts started in this folder import {path} in place of turntrace's own package {name!r}; rename it (my_{name}, say)"
        for name, path in found.items()
    ]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # imported already, by something that left no spec
        return None


def _location(spec: ModuleSpec | None) -> Path | None:
    """The folder or file that the import would read, None where there is none."""
    if spec is None:
        return None
    if spec.origin is None:
        return Path(next(iter(spec.submodule_search_locations or ["."]))).resolve()
    origin = Path(spec.origin)
    return (origin.parent if origin.name == "__init__.py" else origin).resolve()
