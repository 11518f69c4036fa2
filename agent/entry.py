"""The installed command, as the top-level module `turntrace`, and a look at whose packages Python would import.

`agent` and `tools` are names that users' own folders bear. Invariant: before anything of ours is imported, `agent`,
`conversations` and `tools` are known to lie beside each other where turntrace is; otherwise one line names the folder
that came first. Only the standard library is imported here, and nothing is imported to look.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

OURS = {"agent": "entry.py", "conversations": "trajectory.py", "tools": "base.py"}
"""Our packages, each with a file that tells it from a user's folder of that name."""


def main() -> None:
    """The console script: checks the packages, then hands over to `agent.cli`."""
    if problem := shadowing():
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2)
    for note in local_folders(Path.cwd()):
        print(f"note: {note}", file=sys.stderr)
    # Last, so that a user's own tool modules are found and none of theirs hides one that is installed.
    sys.path.append(str(Path.cwd()))
    from agent.cli import main as run

    raise SystemExit(run())


def check_packages() -> None:
    """For scripts: raises ImportError, in one line, where a sibling of `agent` would be imported from elsewhere."""
    if problem := shadowing():
        raise ImportError(problem)


def shadowing() -> str | None:
    """What hides our packages from `import`, and what to do; None where nothing does."""
    found = {name: _location(name) for name in OURS}
    root = _root([path.parent for path in found.values() if path])
    if root is None:
        return f"turntrace's packages are not installed beside each other ({_listed(found)}); install turntrace again"
    for name, path in found.items():
        if path != (root / name).resolve():
            return (
                f"{path or name} hides turntrace's own package {name!r} ({root / name}) from Python: "
                f"rename yours (my_{name}, say), or keep its folder out of PYTHONPATH and start from elsewhere"
            )
    return None


def local_folders(folder: Path) -> list[str]:
    """A line for each package or module of the user's that a script started in `folder` would import instead of ours."""
    specs = {name: PathFinder.find_spec(name, [str(folder)]) for name in OURS}
    # A folder without __init__.py (no loader) gives way to an installed package.
    origins = {name: Path(spec.origin) for name, spec in specs.items() if spec and spec.loader and spec.origin}
    return [
        f"scripts started in this folder import {_folder(origin)} in place of turntrace's own package {name!r}; rename it (my_{name}, say)"
        for name, origin in origins.items()
        if not (origin.parent / OURS[name]).is_file()
    ]


def _location(name: str) -> Path | None:
    """The folder or file that `import name` would read, None where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported already, by something that left no spec
        return None
    if spec is None:
        return None
    if spec.origin:
        return _folder(Path(spec.origin)).resolve()
    return Path(next(iter(spec.submodule_search_locations or ["."]))).resolve()


def _folder(origin: Path) -> Path:
    return origin.parent if origin.name == "__init__.py" else origin


def _root(candidates: list[Path]) -> Path | None:
    """Where all of our packages lie: beside this file (a wheel), above it (a checkout), else where Python finds them.

    The last is for an editable install, where this file is a copy far from the checkout.
    """
    here = Path(__file__).resolve().parent
    return next((path for path in (here, here.parent, *candidates) if _holds_all(path)), None)


def _holds_all(folder: Path) -> bool:
    return all((folder / name / file).is_file() for name, file in OURS.items())


def _listed(found: dict[str, Path | None]) -> str:
    return ", ".join(f"{name}: {path or 'nowhere'}" for name, path in found.items())
