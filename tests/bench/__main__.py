"""`make bench`: prints what the budgets say beside what is measured here, and writes
benchmarks.json.

python -m tests.bench [--quick]

Nothing is asserted: figures belong to a machine and its load, so judge by the ratios, which come
from one run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.bench import (
    chaos,
    encoder,
    http_call,
    loop_cpu,
    memory,
    record,
    sandbox,
    search,
    session_turn,
    tool_turn,
    view,
)
from tests.bench.row import Row, document
from tests.bench.workload import workload
from tools.base import SandboxUnavailable

FILE = Path("benchmarks.json")
COLUMNS = ("what", "ours", "peer", "peer / ours", "budget", "")
WIDTH = 140
"""Of the table where no terminal says otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measures the budgets; writes benchmarks.json."
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats: a look, not a figure to quote"
    )
    quick = parser.parse_args().quick
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    work = workload()
    # Memory and wall time first: verl's import makes the process heavier.
    rows = [
        *tool_turn.rows(work, quick=quick),
        *memory.rows(work, quick=quick),
        *chaos.rows(work, quick=quick),
        *_sandbox(console, quick=quick),
        *search.rows(quick=quick),
        *http_call.rows(quick=quick),
        *record.rows(quick=quick),
        *_view(console, quick=quick),
        *encoder.rows(work, quick=quick),
        *session_turn.rows(work, quick=quick),
        *loop_cpu.rows(work, quick=quick),
    ]
    console.print(_table(rows, work.tokenizer_name))
    FILE.write_text(json.dumps(document(rows), indent=2) + "\n", encoding="utf-8")


def _sandbox(console: Console, *, quick: bool) -> list[Row]:
    try:
        return sandbox.rows(quick=quick)
    except SandboxUnavailable as error:
        console.print(f"no sandbox rows: {error}")
        return []


def _view(console: Console, *, quick: bool) -> list[Row]:
    try:
        return view.rows(quick=quick)
    except pytest.skip.Exception as error:
        console.print(f"no view rows: {error}")
        return []


def _table(rows: list[Row], tokenizer_name: str) -> Table:
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    caption = f"median (lowest-highest) · {tokenizer_name} tokenizer · {machine}"
    table = Table(*COLUMNS, title="turntrace benchmarks", caption=caption)
    for row in rows:
        table.add_row(*row.cells())
    return table


if __name__ == "__main__":
    main()
