"""The runtime on GPUs, measured: `python -m tests.bench.gpu [PART ...]` prints tables and writes
benchmarks-gpu.json.

Each part runs in a process of its own, so that one that fails costs the others nothing. Minutes are
of an H100:

engine    7   the runtime, a trainer's batches and verl's own loop against an ideal loop on one
              in-process engine, for `--conversations` and `--tool-ms`; conversations that end at
              different times; then weight syncs, `release` and `resume`
server    6   `python -m sglang.launch_server` on the same GPU, 64 and 256 conversations; a kill
              and restart under 64
dp        5   a server for each of two or more GPUs behind one pool: scaling, spread, cache hits,
              one server killed
tp        5   a trainer's batch over tensor-parallel ranks, one for each of two or more GPUs, and
              their weight sync
workers   8   `--workers`: two servers behind 1, 2 and 4 workers against one without; an engine for
              each of two or more GPUs against one
parallel  2   one in-process engine over two or more GPUs: `data_parallel_size`, one rank killed
              under load
evidence  2   what per-token evidence costs: top-k log-probs, experts of a mixture of experts
images    3   Qwen3-VL-2B's shape, images of 256 to 1,024 tokens in prompts and from tools, 16
              and 64 conversations; verified at the end
real      3   the embedded model with tools that really run; sampling log-probs against a prefill's

Figures of several calls come together in the one file; `--minutes` ends a call in time, repeats are
left out first. Without a GPU, `--dry` runs every part with a tiny model on CPU engines and servers
(5 to 12 minutes on 2 cores): what it prints is no figure, but what fails there would fail on a GPU.
The exit code is 1 where a figure is missing for an error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.bench.gpu.place import Figures, Place
from tests.bench.gpu.report import errors, table

PARTS = {
    "engine": "engine",
    "server": "server",
    "dp": "servers",
    "tp": "ranks",
    "workers": "workers",
    "parallel": "parallel",
    "evidence": "evidence",
    "images": "images",
    "real": "real",
}
"""Each part's module, which has a function of its own name."""
FILE = Path("benchmarks-gpu.json")
DRY_FILE = Path(tempfile.gettempdir(), f"benchmarks-gpu-dry-{os.getuid()}.json")
GRACE_S = 20.0


def main() -> None:
    options = _options()
    if options.child:
        _run(options)
        return
    if options.dry:
        DRY_FILE.unlink(missing_ok=True)
    elif not _has_gpu():
        sys.exit("there is no GPU here; --dry runs every part with a tiny model on CPU engines")
    figures = Figures(options.json, options.until - 60 * options.minutes)
    for part in options.parts or PARTS:
        if time.time() > options.until:
            print(f"{part}: left out, the {options.minutes:g} minutes are over", flush=True)
            continue
        began, code = time.perf_counter(), _in_a_process(part, options.until)
        ended = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        figures.add(
            "ended",
            part,
            {"error" if code else "with": ended, "took_s": round(time.perf_counter() - began)},
        )
    found = figures.read()
    print(table(found))
    sys.exit(errors(found) > 0)


def _has_gpu() -> bool:
    import torch

    found: bool = torch.cuda.is_available()
    return found


def _in_a_process(part: str, until: float) -> int:
    """Its exit code.

    What has not ended some time after `--minutes` are over is killed with all that it started.
    """
    given = [argument for argument in sys.argv[1:] if argument not in PARTS]
    command = [
        sys.executable,
        "-m",
        "tests.bench.gpu",
        *given,
        "--until",
        str(until),
        "--child",
        part,
    ]
    quiet = {"PYTHONWARNINGS": "ignore", **({"OMP_NUM_THREADS": "1"} if "--dry" in given else {})}
    process = subprocess.Popen(command, env={**quiet, **os.environ})
    try:
        return process.wait(max(0.0, until + GRACE_S - time.time()))
    except subprocess.TimeoutExpired:
        for one in psutil.Process(process.pid).children(recursive=True):
            one.kill()
        process.kill()
        return process.wait()


def _run(options: argparse.Namespace) -> None:
    """The one part that `options.parts` names."""
    [part] = options.parts
    with tempfile.TemporaryDirectory() as folder:
        place = Place(options, Path(folder))
        place.note_machine(part)
        place.gpu.start()
        try:
            getattr(importlib.import_module(f"tests.bench.gpu.{PARTS[part]}"), PARTS[part])(place)
        finally:
            place.gpu.stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without one"
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="a tiny model, few conversations, one round; CPU engines where there is no GPU",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long this call may take")
    parser.add_argument(
        "--conversations",
        dest="sizes",
        type=_numbers,
        default=[64, 256, 1024],
        help="of part engine",
    )
    parser.add_argument(
        "--tool-ms", dest="naps", type=_numbers, default=[0, 50, 500], help="of part engine"
    )
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        help="names to run of each part's contenders (default: all), the ideal first",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of each case of up to 256 conversations"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a folder with the load's tokenizer and config (default: Qwen3-0.6B's shape)",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        help="the tasks of part real (default: generated grade-school problems)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the config, as for `turntrace run`",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help=f"where the figures go (default: {FILE}; where dry, a file that is thrown away)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where engines and servers write",
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.until = options.until or time.time() + 60 * options.minutes
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    options.json = options.json or (DRY_FILE if options.dry else FILE)
    if options.dry:
        options.sizes, options.naps, options.rounds = [4], [0], 1
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
