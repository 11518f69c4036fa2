"""Wall time of a run full of misbehaving tools beside that of its schedule, were nothing but engine
and tools to take time.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests import chaos
from tests.bench.row import Row
from tests.bench.workload import Workload


def rows(workload: Workload, *, quick: bool) -> list[Row]:
    """One row; what it ran is checked by `tests/agent/runs/test_chaos.py`."""
    conversations = 300 if quick else chaos.CONVERSATIONS
    with tempfile.TemporaryDirectory() as folder:
        run = asyncio.run(chaos.run(workload.template, Path(folder) / "run", conversations))
    note = (
        f"{conversations} conversations, {chaos.AT_ONCE} at once, ideal {run.ideal_s:.1f} s; "
        f"a server died {run.deaths} times"
    )
    return [Row("chaos_wall_per_ideal", [run.wall_s / run.ideal_s], note=note)]
