"""A run as a page: time and memory to write it, its size, and how it behaves in Chromium.

python -m tests.bench.view N     # one run of N trajectories, by itself: 100000 takes a few minutes
and 4 GB of disk

Frames are measured while the list is scrolled by a screen at each of them; 16.7 ms is every frame
of a 60 Hz screen.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.process import measured
from tests.bench.row import Row
from tests.browser import chromium, tab
from tests.conversations.synthetic import make_run

TRAJECTORIES, QUICK = 10_000, 1_000
BUDGET_INTERACTIVE_MS, BUDGET_FRAME_MS = 1000.0, 33.4
READY = """new MutationObserver((_, observer) => {
  if (document.documentElement?.dataset.ready === undefined) return;
  observer.disconnect();
  const done = () => { window.interactive = performance.now(); };
  requestAnimationFrame(() => requestAnimationFrame(done));
}).observe(document, { subtree: true, attributes: true, childList: true });"""
SCROLL = """async () => {
  const grid = document.getElementById('grid');
  const frames = [];
  let last = performance.now();
  for (let frame = 0; frame < 200; frame++) {
    grid.scrollTop += grid.clientHeight;
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return frames;
}"""


@dataclass(frozen=True, slots=True)
class Written:
    """What `turntrace view` took: seconds, peak resident MiB, and MB of page."""

    wall_s: float
    peak_mib: float
    size_mb: float


def rows(*, quick: bool, trajectories: int | None = None) -> list[Row]:
    """The figures of one run. `trajectories` None: the usual number."""
    n = trajectories or (QUICK if quick else TRAJECTORIES)
    with tempfile.TemporaryDirectory() as scratch:
        run, page = make_run(Path(scratch) / "run", n), Path(scratch) / "page.html"
        written = _write(run, page, n)
        seen = asyncio.run(_look(page))
    case = f"trajectories={n}"
    return [
        Row(
            "view_write_s",
            [written.wall_s],
            case,
            note="turntrace view, from the run on disk to the page",
        ),
        Row("view_peak_mib", [written.peak_mib], case, note="resident, all of the process"),
        Row("view_page_mb", [written.size_mb], case),
        Row(
            "view_interactive_ms",
            [seen["interactive"]],
            case,
            limit=BUDGET_INTERACTIVE_MS,
            note="from opening to the list painted, from disk",
        ),
        Row(
            "view_frame_ms",
            seen["frames"],
            case,
            limit=BUDGET_FRAME_MS,
            note=f"95%: {_p95(seen['frames']):.1f}; scrolling a screen a frame",
        ),
        Row("view_search_ms", [seen["search"]], case, note="all texts, words that some hold"),
        Row("view_open_ms", [seen["open"]], case, note="a trajectory, from key to messages"),
    ]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _write(run: Path, page: Path, n: int) -> Written:
    wall_s, peak_mib = measured(["view", str(run), "--out", str(page), "--limit", str(n)])
    return Written(wall_s, peak_mib, page.stat().st_size / 1e6)


async def _look(page: Path) -> dict[str, Any]:
    async with chromium() as browser, tab(browser, page, script=READY) as opened:
        found = {
            "interactive": await opened.until("window.interactive"),
            "frames": await opened.page.evaluate(SCROLL),
        }
        started = time.perf_counter()
        await opened.page.evaluate("location.hash = '#/list?q=division by zero'")
        await opened.until("document.getElementById('grid').getAttribute('aria-busy') === 'true'")
        await opened.until("document.getElementById('grid').getAttribute('aria-busy') === 'false'")
        found["search"] = 1000 * (time.perf_counter() - started)
        started = time.perf_counter()
        await opened.page.keyboard.press("Enter")
        await opened.until("document.querySelector('#detail .message')")
        return {**found, "open": 1000 * (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.view",
        description="Measures the page of a run of N trajectories.",
    )
    parser.add_argument("n", type=int, help="trajectories")
    for row in rows(quick=False, trajectories=parser.parse_args().n):
        name, ours, _, _, limit, note = row.cells()
        print(f"{name:<44} {ours:>24} {limit:>10}  {note}")


if __name__ == "__main__":
    main()
