"""The parts of the measurement, each in a process of its own: an engine, what runs on it, its figures."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import importlib.metadata
import json
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.config import load_config
from agent.session import load_template
from tests.bench.gpu.load import PROMPT_LENGTH, RESPONSE_LENGTH, TURNS, Load, Outcome
from tests.bench.gpu.machine import Gpu
from tests.bench.gpu.model import qwen3_shape

MAX_MODEL_LEN = 8192
STORE = Path("/dev/shm")


class Figures:
    """The figures so far: a line on the terminal for each, the file written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, part: str, case: str, value: dict[str, Any]) -> None:
        found = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        found.setdefault(part, {})[case] = value
        self._path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{part} · {case}: {json.dumps(value)}", flush=True)


@dataclasses.dataclass(slots=True)
class Place:
    """Where a part runs: what was asked for, a scratch folder, the GPU's figures, the figures to add to."""

    options: argparse.Namespace
    folder: Path
    gpu: Gpu
    figures: Figures

    @property
    def model(self) -> Path:
        given: Path | None = self.options.model
        target = self.folder / "model"
        return given or (target if target.exists() else qwen3_shape(target))

    @property
    def config(self) -> Any:
        """The product's defaults, in the load's sizes."""
        path = self.folder / "config.yaml"
        rollout = {
            "prompt_length": PROMPT_LENGTH,
            "response_length": RESPONSE_LENGTH,
            "max_model_len": MAX_MODEL_LEN,
            "load_format": "dummy",
            "multi_turn": {"enable": True, "max_assistant_turns": TURNS},
        }
        path.write_text(json.dumps({"model_path": str(self.model), "rollout": rollout}))
        return load_config(path, self.options.overrides)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Numbers of conversations, and how many rounds of each."""
        rounds = self.options.rounds
        return [(size, rounds[min(index, len(rounds) - 1)]) for index, size in enumerate(self.options.sizes)]

    @contextmanager
    def noting(self, part: str, case: str) -> Iterator[dict[str, Any]]:
        """Adds the figures put into the dict, or the error that ended them."""
        figures: dict[str, Any] = {}
        try:
            yield figures
        except Exception as error:
            traceback.print_exc()
            figures["error"] = f"{type(error).__name__}: {error}"[:500]
        self.figures.add(part, case, figures)


def run(options: argparse.Namespace) -> None:
    """The one part that `options.parts` names."""
    [name] = options.parts
    with tempfile.TemporaryDirectory() as folder:
        place = Place(options, Path(folder), Gpu(), Figures(options.json))
        place.gpu.start()
        try:
            place.figures.add("machine", name, _machine(options))
            PARTS[name](place)
        finally:
            place.gpu.stop()


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    asked = "--query-gpu=name,memory.total,driver_version"
    gpu = ""
    with suppress(OSError):
        gpu = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("sglang", "verl", "torch", "transformers")}
    return {"gpu": gpu, **versions, "set": options.overrides}


@contextmanager
def _rollout(place: Place) -> Iterator[tuple[Any, Load, asyncio.AbstractEventLoop]]:
    """An AgentRollout in this process, its load, and the event loop that both live on: the main thread's, as in a trainer."""
    from agent.engines.sglang import start

    config = place.config
    began = perf_counter()
    rollout = start(config.verl_rollout(), config.model_dir(), log_path=place.options.logs / "engine.log")
    place.figures.add("machine", "engine", {"start_s": round(perf_counter() - began, 1)})
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    template = load_template(config, config.model_dir())
    template.require("tool")

    async def raw(ids: list[int], sampling: dict[str, Any]) -> Any:
        return await rollout._engine.async_generate(input_ids=ids, sampling_params=sampling, return_logprob=True)

    gc.collect()
    gc.freeze()  # as a run does
    try:
        yield rollout, Load(rollout.engine(), raw, template, place.gpu), loop
    finally:
        with suppress(Exception):
            loop.run_until_complete(rollout.engine().close())
        rollout.shutdown()


def engine(place: Place) -> None:
    """The load, then weights and memory, on one in-process engine."""
    with _rollout(place) as (rollout, contenders, loop):
        _load(place, rollout, contenders, loop)
        _sync(place, rollout, contenders, loop)


def _load(place: Place, rollout: Any, contenders: Load, loop: asyncio.AbstractEventLoop) -> None:
    """Every contender in every case, interleaved round by round, each with an empty cache.

    The two that take a trainer's batches run in the last round only, ours with the first tool time alone.
    """
    from tests.bench.gpu.batches import Batches

    options = place.options
    batches = Batches(rollout, contenders, place.model, place.folder, place.gpu)
    runs: dict[str, Callable[[int, float], Outcome]] = {
        "ideal": lambda size, nap_s: loop.run_until_complete(contenders.ideal(size, nap_s)),
        "ours": lambda size, nap_s: loop.run_until_complete(contenders.ours(size, nap_s)),
        "stored": lambda size, nap_s: loop.run_until_complete(contenders.ours(size, nap_s, STORE / f"turntrace-{os.getpid()}")),
        "trainer": batches.ours,
        "verl": batches.verl,
    }
    for name in runs:  # what a first run loads and compiles
        with place.noting("warm-up", name) as figures:
            figures |= _figures(runs[name](min(options.sizes), 0.0))
    for size, rounds in place.sizes:
        for nap_ms in options.naps:
            for round_ in range(rounds):
                batch = ("trainer", "verl") if nap_ms == options.naps[0] else ("verl",)
                for name in ("ideal", "ours", "stored", *(batch if round_ == rounds - 1 else ())):
                    loop.run_until_complete(rollout._engine.flush_cache())
                    with place.noting("load", f"{size} conversations, {nap_ms} ms, {name}, round {round_ + 1}") as figures:
                        figures |= _figures(runs[name](size, nap_ms / 1000))


def _figures(outcome: Outcome) -> dict[str, Any]:
    usage = outcome.usage
    return {
        "tokens_per_s": round(outcome.tokens_per_s),
        "wall_s": round(usage.wall_s, 3),
        "cpu_s": round(usage.cpu_s, 3),
        "gpu_busy": None if usage.gpu_busy is None else round(usage.gpu_busy, 1),
        **{
            name: None if (share := getattr(outcome, name)) is None else round(share, 3)
            for name in ("cached_share", "engine_share", "tool_share")
        },
    }


def _sync(place: Place, rollout: Any, contenders: Load, loop: asyncio.AbstractEventLoop) -> None:
    """Weights and memory."""
    import torch

    from tests.bench.gpu.sync import Sync

    weights = Sync(rollout, place.model, "cuda" if torch.cuda.is_available() else "cpu")
    with place.noting("sync", "update_weights") as figures:
        figures |= loop.run_until_complete(weights.rows(2 if place.options.quick else 10))
    with place.noting("sync", "in flight") as figures:
        figures |= loop.run_until_complete(weights.in_flight(contenders, min(place.options.sizes)))
    with place.noting("sync", "release and resume") as figures:
        figures |= loop.run_until_complete(weights.release())


def real(place: Place) -> None:
    """The embedded model with its own tools."""
    from tests.bench.gpu.real import RealRun

    options = place.options
    size = 8 if options.quick else 512
    tasks = options.tasks or _problems(place.folder / "tasks.jsonl", size)
    wider = [] if options.quick else ["rollout.max_num_seqs=256", "rollout.gpu_memory_utilization=0.5"]
    run = RealRun(load_config(None, [*wider, *options.overrides]), "gsm8k", options.logs / "engine-real.log")
    with run.session:
        for case in ("first", "second"):
            with place.noting("real", f"gsm8k tools, {case} run") as figures:
                figures |= run.run(tasks, size, options.logs / f"run-{case}", place.gpu)
        with place.noting("real", "log-probs, sampling against prefill") as figures:
            figures |= run.logprobs(tasks, min(size, 256))


def _problems(path: Path, size: int) -> Path:
    from agent.task_sources import write_gsm_symbolic

    write_gsm_symbolic(path, size, 1)
    return path


def server(place: Place) -> None:
    """The load through a real server, and its death."""
    asyncio.run(_server(place))


async def _server(place: Place) -> None:
    from agent.engines.sglang_server import SGLangServerEngine
    from tests.bench.gpu.server import ServerProcess, bare, killed_under_load

    options, config = place.options, place.config
    process = ServerProcess(place.model, _server_flags(place), options.logs / "server.log")
    template = load_template(config, config.model_dir())
    template.require("tool")
    process.start()
    try:
        with place.noting("server", "start") as figures:
            figures["start_s"] = round(await asyncio.to_thread(process.wait), 1)
        engine = SGLangServerEngine([process.url], max_connections=max(options.sizes))
        await engine.connect()
        contenders = Load(engine, bare(engine), template, place.gpu)
        await contenders.ours(min(options.sizes), 0.0)
        for size, rounds in place.sizes:
            for round_ in range(rounds):
                for name in ("ideal", "ours"):
                    with place.noting("server", f"{size} conversations, 0 ms, {name}, round {round_ + 1}") as figures:
                        figures |= _figures(await getattr(contenders, name)(size, 0.0))
        with place.noting("server", "killed and started again under load") as figures:
            figures |= await killed_under_load(process, contenders, min(options.sizes))
        await engine.close()
    finally:
        process.kill()


def _server_flags(place: Place) -> dict[str, Any]:
    """What the in-process engine gets, as far as it decides speed."""
    rollout = place.config.rollout
    return {
        "load_format": "dummy",
        "dtype": rollout.dtype,
        "mem_fraction_static": rollout.gpu_memory_utilization,
        "context_length": MAX_MODEL_LEN + 8,
        "max_running_requests": rollout.max_num_seqs,
        "chunked_prefill_size": rollout.max_num_batched_tokens,
        "max_prefill_tokens": rollout.max_num_batched_tokens,
        "attention_backend": "fa3",
        **rollout.engine_kwargs.sglang,
    }


PARTS: dict[str, Callable[[Place], None]] = {"engine": engine, "real": real, "server": server}
