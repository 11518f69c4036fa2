"""Optional dependencies: each is imported where it is needed.

If one is missing, that is one line that names the extra to install.
"""

from __future__ import annotations

import importlib.util

from tools.base import ToolConfigError


def require(*modules: str, extra: str) -> None:
    """Checks that the modules of an extra are installed, without importing them.

    Raises ToolConfigError with one line that says what to install.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise ToolConfigError(f"{names} {verb} not installed: pip install 'turntrace[{extra}]'")
