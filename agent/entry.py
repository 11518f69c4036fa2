"""The console script, installed as the top-level module `turntrace`.

No user's folder has that name. It checks that `agent` is ours before it imports it; `agent` then
checks the other packages. A wheel has this file only as turntrace.py, an editable install as a
copy: nothing may import `agent.entry`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Runs the command; one line and exit code 2 if Python would import other people's packages."""
    spec = importlib.util.find_spec("agent")
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin is None or not (origin.parent / "packages.py").is_file():
        _refuse(
            f"{origin} hides turntrace's own package 'agent': rename yours (to my_agent), "
            "or keep its folder out of PYTHONPATH"
            if origin
            else "turntrace's package 'agent' is not installed; install turntrace again"
        )
    try:
        from agent.packages import local_folders
    except ImportError as error:
        _refuse(str(error))
    for note in local_folders(Path.cwd()):
        print(f"note: {note}", file=sys.stderr)
    try:
        from agent.cli import main as run
    except KeyboardInterrupt:  # a moment after the start; later the command itself says so
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(run())


def _refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)
