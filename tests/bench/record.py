"""The commands on a run: seconds and peak memory of each, on run folders of 1,000 and 10,000
trajectories (`--quick`: 1,000).

Each command is a process of its own, as a user starts it; the peak is that of its largest process.
The time of the smaller run says what the start costs, the memory of the larger whether it stays
flat.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.process import measured
from tests.bench.row import Row
from tests.conversations.synthetic import make_run

SIZES = (1_000, 10_000)


def _export(to: str, run: Path, scratch: Path) -> list[str]:
    return ["export", str(run), "--to", to, "--out", str(scratch)]


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "verify": lambda run, scratch: ["verify", str(run)],
    "stats": lambda run, scratch: ["stats", str(run)],
    **{f"export {to}": partial(_export, to) for to in ("parquet", "trl-sft", "atif", "verl-sft")},
}
"""The arguments of each command, given the run and a folder to write to."""


def rows(*, quick: bool) -> list[Row]:
    """Wall seconds, and MiB at the peak, by command and size."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        return [
            row
            for size in (SIZES[:1] if quick else SIZES)
            for row in _of_size(make_run(scratch / f"run{size}", size), size, scratch)
        ]


def _of_size(run: Path, size: int, scratch: Path) -> list[Row]:
    found: list[Row] = []
    for name, arguments in COMMANDS.items():
        case = f"{name} {size}"
        wall_s, peak_mib = measured(arguments(run, scratch / case.replace(" ", "-")))
        found.append(Row("record_s", [wall_s], case, note=f"{os.cpu_count()} cores"))
        found.append(Row("record_peak_mib", [peak_mib], case, note="of the largest process"))
    return found
