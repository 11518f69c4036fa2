"""`turntrace verify`: prints a line for each defect, then a summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.terminal import LiveLine

if TYPE_CHECKING:
    from conversations.checks.finding import Defect
    from conversations.verify import Verdict


def verify(
    run: Annotated[Path, typer.Argument(help="The run folder. A run may still write to it.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: each defect, then the summary.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a CPU.")] = None,
) -> None:
    """Prove a run folder: hashes, tokens against messages, the ledger, groups, counts.

    Exit code 1 if anything is wrong.
    """
    from rich.console import Console

    from conversations.verify import verify_run

    read = total = 0

    def line() -> str:
        return f"{100 * read // max(total, 1):3d}% of {total / 1e6:.0f} MB"

    def show_progress(done: int, of: int) -> None:
        nonlocal read, total
        read, total = done, of
        progress.refresh()

    def show_defect(defect: Defect) -> None:
        progress.hide()
        print(json.dumps(defect.as_json()) if as_json else defect, flush=True)

    processes = jobs or len(os.sched_getaffinity(0))
    with LiveLine(Console(stderr=True), line, plain_s=None) as progress:
        verdict = verify_run(run, jobs=processes, on_defect=show_defect, on_progress=show_progress)
    _sum_up(verdict, as_json=as_json)
    raise typer.Exit(1 if verdict.defects else 0)


def _sum_up(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(verdict.as_json()))
        return
    for note in verdict.notes:
        print(f"note: {note}")
    print(verdict)
