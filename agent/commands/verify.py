"""`turntrace verify`: one line a defect, a summary, and an exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from conversations.checks.finding import Defect
    from conversations.verify import Verdict


def verify(
    run: Annotated[Path, typer.Argument(help="The run folder; it may still be written to.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: each defect, then the summary.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a CPU.")] = None,
) -> None:
    """Prove a run folder: hashes, tokens against messages, the ledger, groups, counts; exit code 1 where anything is wrong."""
    from conversations.verify import verify_run

    with _Bar(shown=sys.stderr.isatty()) as bar:

        def tell(defect: Defect) -> None:
            bar.clear()
            print(json.dumps(defect.as_json()) if as_json else defect, flush=True)

        verdict = verify_run(
            run, jobs=jobs or len(os.sched_getaffinity(0)), on_defect=tell, on_progress=bar.move
        )
    _sum_up(verdict, as_json=as_json)
    raise typer.Exit(1 if verdict.defects else 0)


def _sum_up(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(verdict.as_json()))
        return
    for note in verdict.notes:
        print(f"note: {note}")
    print(verdict)


class _Bar:
    """How far it is, on the terminal's last line. Plain writes: processes fork here, and rich's bar is a thread."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._percent = -1

    def move(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if self._shown and percent != self._percent:
            self._percent = percent
            print(f"\r{percent:3d}% of {total / 1e6:.0f} MB", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown and self._percent >= 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._percent = -1

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
