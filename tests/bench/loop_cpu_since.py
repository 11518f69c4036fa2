"""Loop CPU a turn of this tree beside that of an earlier commit.

    python -m tests.bench.loop_cpu_since 6a80577 [--rounds 4 | --instructions]

Each tree measures in a process of its own, with its own `tests/bench/loop_cpu.py`. The processes
take turns, figure by figure, so that a busy machine disturbs both alike; the least of a tree's
figures is the one that was disturbed least. Uncommitted changes of this tree count.

`--instructions` counts instead of timing: valgrind's callgrind (Debian's package valgrind) counts
the instructions of the same turns, which no other process disturbs. It leaves the kernel out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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

COUNT = """
import gc, os, subprocess, sys
from tests.bench import loop_cpu
from tests.bench.workload import workload
work = workload()
ours_ms = getattr(loop_cpu, "ours_ms", None) or loop_cpu._ours  # its name in earlier commits
loop_cpu.TURNS_OF_A_REPEAT = 512
ours_ms(work, 4)
gc.collect()
gc.freeze()
def count(switch):
    subprocess.run(["callgrind_control", "-i", switch, str(os.getpid())], stdout=-3, check=True)
count("on")
ours_ms(work, int(sys.argv[1]))
count("off")
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
    parser.add_argument("--instructions", action="store_true", help="count them with valgrind")
    arguments = parser.parse_args()
    if arguments.instructions and not shutil.which("callgrind_control"):
        raise SystemExit("--instructions needs valgrind: apt-get install valgrind")
    with _checkout(arguments.commit) as folder:
        if arguments.instructions:
            print("loop, million instructions for 512 turns")
            for turns in TURNS:
                _print(
                    turns, [arguments.commit, "here"], [_count(folder, turns), _count(ROOT, turns)]
                )
            return
        trees = {arguments.commit: Tree(folder), "here": Tree(ROOT)}
        for _ in range(arguments.rounds):
            for turns in TURNS:
                for tree in trees.values():
                    tree.measure(turns)
        for tree in trees.values():
            tree.end()
    print("loop CPU, ms a turn, the least of", arguments.rounds)
    for turns in TURNS:
        _print(turns, trees, [min(tree.figures[turns]) for tree in trees.values()])


def _print(turns: int, names: Iterable[str], figures: Sequence[float]) -> None:
    texts = (f"{name} {figure:.4g}" for name, figure in zip(names, figures, strict=True))
    print(f"{turns:3} turns  {'  '.join(texts)}  {figures[1] / figures[0] - 1:+.1%}", flush=True)


def _count(folder: Path, turns: int) -> float:
    """Million instructions of the tree in `folder` for 512 turns."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--instr-atstart=no"),
                f"--callgrind-out-file={scratch}/out",
                *(sys.executable, "-c", COUNT, str(turns)),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"valgrind ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(found[1]) / 1e6


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
