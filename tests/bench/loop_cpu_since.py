"""Loop CPU a turn of this tree beside that of an earlier commit.

    python -m tests.bench.loop_cpu_since 6a80577 [--rounds 4]

Each tree measures in a process of its own, with its own `tests/bench/loop_cpu.py`. The processes
take turns, figure by figure, so that a busy machine disturbs both alike; the least of a tree's
figures is the one that was disturbed least. Uncommitted changes of this tree count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.bench.loop_cpu import TURNS
from tests.helpers import ROOT

MEASURE = """
import gc, sys
from tests.bench import loop_cpu
from tests.bench.workload import workload
work = workload()
ours_ms = getattr(loop_cpu, "ours_ms", None) or loop_cpu._ours  # its name in earlier commits
ours_ms(work, 4)
gc.collect()
gc.freeze()
print("ready", flush=True)
for turns in sys.stdin:
    print(ours_ms(work, int(turns)), flush=True)
"""


class Tree:
    """A process that measures the code of one folder."""

    def __init__(self, folder: Path) -> None:
        self.figures: dict[int, list[float]] = defaultdict(list)
        self._process = subprocess.Popen(
            [sys.executable, "-c", MEASURE],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def measure(self, turns: int) -> None:
        assert self._process.stdin
        print(turns, file=self._process.stdin, flush=True)
        self.figures[turns].append(float(self._line()))

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit("the process that measures has ended")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loop_cpu_since")
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    with _checkout(arguments.commit) as folder:
        trees = {arguments.commit: Tree(folder), "here": Tree(ROOT)}
        for _ in range(arguments.rounds):
            for turns in TURNS:
                for tree in trees.values():
                    tree.measure(turns)
        for tree in trees.values():
            tree.end()
    print("loop CPU, ms a turn, the least of", arguments.rounds)
    for turns in TURNS:
        before, now = (min(tree.figures[turns]) for tree in trees.values())
        names = zip(trees, (before, now), strict=True)
        texts = (f"{name} {figure:.4f}" for name, figure in names)
        print(f"{turns:3} turns  {'  '.join(texts)}  {now / before - 1:+.1%}")


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """A git worktree of that commit, removed again."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


if __name__ == "__main__":
    main()
