"""The run that the tests of exports share, and an export of it; made once a process."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from conversations.export import job
from conversations.export.filters import Filters
from conversations.export.job import Export
from conversations.open_run import Run, open_run
from tests.conversations.synthetic import make_run

TRAJECTORIES = 60


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="turntrace-exports-")


@functools.cache
def small_run() -> Run:
    """60 trajectories in groups of 4: calls that work and fail, malformed ones, thoughts, cuts, infrastructure failures."""
    return open_run(make_run(Path(_scratch().name) / "run", TRAJECTORIES, distinct=TRAJECTORIES))


@functools.cache
def exported(to: str, filters: Filters | None = None) -> tuple[Path, Export]:
    """The folder that an export of that run wrote, and what it said."""
    out = Path(tempfile.mkdtemp(dir=_scratch().name)) / to
    return out, job.export(small_run(), to, out, filters)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines export."""
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="ascii").splitlines()]
