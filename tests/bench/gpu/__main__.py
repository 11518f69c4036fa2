"""The runtime on a GPU, measured: `python -m tests.bench.gpu [PART ...]` prints one table and writes benchmarks-gpu.json.

Each part runs in a process of its own, so that one that fails costs the others nothing:

engine    the runtime, a trainer's batches and verl's own loop against an ideal loop on one in-process engine; then
          `update_weights` between and in the midst of batches, `release` and `resume`
real      the embedded model with tools that really run; sampling log-probs against a prefill's
server    `python -m sglang.launch_server` on the same GPU, and a kill and restart under load
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from tests.bench.gpu import parts
from tests.bench.gpu.report import table

PARTS = tuple(parts.PARTS)
FILE = Path("benchmarks-gpu.json")


def main() -> None:
    options = _options()
    if options.child:
        parts.run(options)
        return
    for part in options.parts or PARTS:
        began = perf_counter()
        code = subprocess.run([sys.executable, "-m", "tests.bench.gpu", *_arguments(), "--child", part]).returncode
        print(f"[{part}: {perf_counter() - began:.0f} s, exit code {code}]", flush=True)
    print(table(json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}))


def _arguments() -> list[str]:
    """This command's own, without the parts."""
    return [argument for argument in sys.argv[1:] if argument not in PARTS]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description="Measures the runtime on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without one")
    parser.add_argument("--quick", action="store_true", help="few conversations, one round: a look, not a figure to quote")
    parser.add_argument("--json", type=Path, default=FILE, help="where the figures go")
    parser.add_argument("--conversations", dest="sizes", type=_numbers, default=[64, 256, 1024])
    parser.add_argument("--tool-ms", dest="naps", type=_numbers, default=[0, 50, 500])
    parser.add_argument(
        "--rounds", type=_numbers, default=[3], help="of each case, or of each number of conversations; the first is warm-up"
    )
    parser.add_argument("--model", type=Path, help="a folder with the load's tokenizer and config (default: Qwen3-0.6B's shape)")
    parser.add_argument("--tasks", type=Path, help="the tasks of `real` (default: generated grade-school problems)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of the config, as for `turntrace run`"
    )
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.naps, options.rounds = [8], [0], [1]
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
