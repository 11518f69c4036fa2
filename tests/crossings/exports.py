"""Every export of a run of records that faults ended."""

from __future__ import annotations

from pathlib import Path

from conversations.errors import ExportError
from conversations.export import formats, job
from conversations.open_run import Run

PAIRS = {"openrlhf-preference", "trl-preference"}
"""They write pairs of one task's samples; each task of the crossings has one sample."""


def without_rows(run: Run, folder: Path) -> set[str]:
    """Exports a run in every format; the names of those that found nothing to write."""
    empty = set()
    for name in formats.export_names():
        try:
            job.export_run(run, name, folder / f"as-{name}")
        except ExportError as error:
            if "nothing is left to export" not in str(error):
                raise
            empty.add(name)
    return empty
