"""verl's own search client, to hold ours against."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType


@functools.cache
def verl_client() -> ModuleType:
    """verl's own functions, from their file: importing their package would take half a minute."""
    verl = importlib.util.find_spec("verl")
    assert verl is not None
    assert verl.submodule_search_locations
    file = Path(verl.submodule_search_locations[0]) / "tools" / "utils" / "search_r1_like_utils.py"
    spec = importlib.util.spec_from_file_location("search_r1_like_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
