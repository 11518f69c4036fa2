"""Finds the run that a replay was made from, or that a training's round follows.

Invariant: a parent is known by the hash of its run.json, so a run folder from elsewhere cannot name
any folder of this machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from conversations.run.open_run import Run, open_run
from conversations.run.store import RUN


def parent_of(run: Run) -> Run | None:
    """The run that `run.manifest` names as `parent` or `follows`, at its place or beside this one.

    None if there is none, or if it has changed.
    """
    parent = run.manifest.get("parent") or run.manifest.get("follows")
    if not isinstance(parent, dict) or not parent.get("run_sha256"):
        return None
    named = [parent[key] for key in ("path", "run") if isinstance(parent.get(key), str)]
    folders = [run.path.resolve().parent / name for name in named]
    found = next(
        (folder for folder in folders if _hash(folder / RUN) == parent.get("run_sha256")), None
    )
    return None if found is None else open_run(found)


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
