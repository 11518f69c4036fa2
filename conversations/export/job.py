"""`turntrace export`: selects, writes into a new folder, describes it, renames it.

Invariant: the out folder exists complete with its card, or not at all (`new_folder`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from conversations.errors import ExportError
from conversations.export.card import card
from conversations.export.export import Export
from conversations.export.filters import Filters, Selection
from conversations.export.formats import ALL, TRUNK, Source, get_format
from conversations.run.new_folder import new_folder
from conversations.run.open_run import Run
from conversations.run.store import RUN, TRAJECTORIES

CARD = "README.md"


def export_run(
    run: Run,
    to: str,
    out: str | Path,
    filters: Filters | None = None,
    *,
    batch_size: int = 256,
    branches: str = ALL,
    command: str = "",
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Writes the run's selected trajectories in the format `to` into the new folder `out`.

    `progress` is called with the number of trajectories read so far; `command` goes into the card.
    `branches` is "all", or "trunk" for a session's main sequence alone.
    Raises ExportError if `out` exists, the format does not, nothing is left to write, or a value
    has no place in the format.
    """
    chosen, filters, out = get_format(to), filters or Filters(), Path(out)
    selection = Selection(run, filters, progress)
    if branches not in (TRUNK, ALL):
        raise ExportError(f"branches is {branches!r}, expected {TRUNK} or {ALL}")
    source = Source(run, selection, batch_size, branches, takes_images=chosen.takes_images)
    with new_folder(out, ExportError) as folder:
        rows = chosen.write(chosen.rows(source), folder)
        if rows == 0:
            reasons = _reasons(selection.dropped + source.left_out)
            raise ExportError(f"nothing is left to export of {len(run)} trajectories: {reasons}")
        done = Export(
            format=chosen,
            run=run.path,
            manifest=run.manifest,
            run_files={name: _sha256(run.path / name) for name in (RUN, TRAJECTORIES)},
            command=command,
            filters=filters,
            rows=rows,
            whole=selection.whole,
            kept=selection.kept,
            dropped=selection.dropped,
            left_out=source.left_out,
            verdicts=source.verdicts,
            differing=source.differing,
            notes=source.notes,
            files={
                file.name: (_sha256(file), file.stat().st_size) for file in sorted(folder.iterdir())
            },
        )
        (folder / CARD).write_text(card(done), encoding="utf-8")
    return done


def _reasons(counts: Counter[str]) -> str:
    return (
        ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        or "the run is empty"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
