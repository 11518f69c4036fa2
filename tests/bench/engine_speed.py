"""The engine in process under several set-ups, in one run.

    python -m tests.bench.engine_speed PYTHON ...

Each PYTHON is the interpreter of an environment with its own SGLang, all on one machine. They take
turns, so that a busy minute does not fall on one of them alone. Printed for each: versions, seconds
until the engine is up, tokens a second and CPU milliseconds a token at 1, 8 and 16 concurrent
requests (128 tokens of prompt, 64 sampled; the best round and all rounds), the size of the
environment, and whether the greedy ids and log-probs are those of the first.

On a machine that others use too, the CPU time is the better measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

PROMPT, SAMPLED = 128, 64
LEVELS = (1, 8, 16)
CHILD = "--child"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default=None, help="default: what the CPU is fast at")
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("MEASURED " + json.dumps(measure(given.dtype)))
        return
    rounds = [
        [run_child(python, given.dtype) for python in given.pythons] for _ in range(given.rounds)
    ]
    for index, python in enumerate(given.pythons):
        print(report(python, [one[index] for one in rounds], rounds[0][0]))


def run_child(python: str, dtype: str | None) -> dict[str, Any]:
    """One measurement in another interpreter."""
    command = [python, "-m", "tests.bench.engine_speed", CHILD]
    command += ["--dtype", dtype] if dtype else []
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"{python} measured nothing: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(lines[0].removeprefix("MEASURED "))
    return measured


def measure(dtype: str | None) -> dict[str, Any]:
    """Starts the engine with the embedded model and measures it."""
    from agent.engines.start import start
    from agent.model.base import base_model_dir

    began = time.perf_counter()
    config = {
        "prompt_length": 512,
        "response_length": 512,
        "max_num_seqs": max(LEVELS),
        "dtype": dtype,
    }
    rollout = start(config, base_model_dir(), log_path=Path(os.devnull))
    started_s = time.perf_counter() - began
    return {
        "engine": rollout.engine().describe(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "start_s": started_s,
        **asyncio.run(load(rollout.engine())),
        "environment_mb": size_mb(Path(sys.prefix)),
    }


async def load(engine: Any) -> dict[str, Any]:
    """Tokens a second at each level, and the first request's ids and log-probs."""
    await generate(engine, 0, 8)
    first = await generate(engine, 1, 16)
    speeds, cpu = {}, {}
    for level in LEVELS:
        began, cpu_began = time.perf_counter(), cpu_s()
        await asyncio.gather(*(generate(engine, 100 * level + i, SAMPLED) for i in range(level)))
        speeds[str(level)] = level * SAMPLED / (time.perf_counter() - began)
        cpu[str(level)] = 1000 * (cpu_s() - cpu_began) / (level * SAMPLED)
    await engine.close()
    return {
        "tokens_per_s": speeds,
        "cpu_ms_per_token": cpu,
        "ids": first.token_ids,
        "logprobs": first.logprobs,
    }


def cpu_s() -> float:
    """CPU seconds of this process and its children so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(one.user + one.system for one in times)


async def generate(engine: Any, seed: int, count: int) -> Any:
    ids = [1, *((7 * i + 131 * seed) % 40000 + 100 for i in range(PROMPT - 1))]
    sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
    return await engine.generate(ids, sampling, request_id=uuid.uuid4().hex)


def size_mb(folder: Path) -> float:
    """Megabytes of all files, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def report(python: str, measured: list[dict[str, Any]], reference: dict[str, Any]) -> str:
    """The lines on one environment."""
    first = measured[0]
    engine = first["engine"]
    lines = [
        f"{python}: SGLang {engine['sglang']}, torch {engine['torch']}, Python {first['python']}, "
        f"{engine['dtype']}, {first['environment_mb']:.0f} MB",
        f"  start {statistics.fmean(one['start_s'] for one in measured):.1f} s",
    ]
    for level in map(str, LEVELS):
        speeds = [one["tokens_per_s"][level] for one in measured]
        shown = " ".join(f"{speed:.1f}" for speed in speeds)
        cpu = [one["cpu_ms_per_token"][level] for one in measured]
        lines.append(
            f"  {level:>2} at once: {max(speeds):.1f} tokens/s (rounds: {shown}), "
            f"{min(cpu):.2f} CPU ms a token (rounds: {' '.join(f'{one:.2f}' for one in cpu)})"
        )
    is_same = (first["ids"], first["logprobs"]) == (reference["ids"], reference["logprobs"])
    lines.append(f"  ids and log-probs {'are' if is_same else 'ARE NOT'} those of the first")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
