"""Part `workers`: the load through `turntrace run --workers`, records on disk: two servers behind
two workers against one behind one process, and an engine for each GPU against one.

All of it goes through what a user's run goes through, a `Session` or a `WorkerPool`, and a run
folder in shared memory. Each run has prompts of its own, so no cache helps the later ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.config.config import Config, load_config
from agent.engines.engine import Engine, Generation, SamplingParams
from agent.loop.batch import Progress, run_tasks
from agent.loop.tasks import Task
from agent.runs.parts import Parts, config_tools, prepare, start_engine
from agent.runs.session import Session
from agent.workers.pool import WorkerPool
from conversations.run.store import RunFolder
from tests.bench.gpu.load import TOOL_SCHEMA, TURNS, VARIANTS, scripted_turns
from tests.bench.gpu.place import WARM_UP, Place
from tests.bench.gpu.server import SIZES, ServerProcess, running, server_flags
from tests.helpers import tokenizer_at

EACH = SIZES[-1]
"""Conversations for each server or engine."""
NAP_S = 0.05
SHARED_MEMORY = Path("/dev/shm")


class ScriptedTurnsEngine:
    """A worker's engine: every turn is sampled, then a scripted one of as many tokens stands for
    it, since a model with random weights calls no tools.
    """

    def __init__(self, engine: Engine, turns: Sequence[Sequence[int]]) -> None:
        self._engine, self._turns = engine, turns

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    async def connect(self) -> None:
        if connect := getattr(self._engine, "connect", None):
            await connect()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        turn = self._turns[len(prompt_ids) % VARIANTS]
        work = {"temperature": 1.0, "max_new_tokens": len(turn), "ignore_eos": True}
        sampled = await self._engine.generate(prompt_ids, work, request_id=request_id)
        if len(sampled.token_ids) != len(turn):
            raise RuntimeError(f"{len(sampled.token_ids)} tokens instead of {len(turn)}")
        return dataclasses.replace(sampled, token_ids=list(turn), finish_reason="stop")

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def close(self) -> None:
        await self._engine.close()


@dataclasses.dataclass(frozen=True)
class Start:
    """Starts a worker's engine, with the load's turns over it."""

    turn_tokens: int

    def __call__(self, config: Config, log: Path | None) -> Engine:
        from conversations.template import ChatTemplate

        template = ChatTemplate(tokenizer_at(config.model_dir()))
        turns = scripted_turns(template, self.turn_tokens)
        return ScriptedTurnsEngine(start_engine(config, log), turns)


def workers(place: Place) -> None:
    if place.devices < 2:
        why = f"it needs two GPUs, found {place.devices}"
        place.figures.add("workers", "left out", {"why": why})
        return
    each = max(place.options.sizes) if place.dry else EACH
    _of_servers(place, each)
    _of_engines(place, each)


def _of_servers(place: Place, each: int) -> None:
    flags, logs = server_flags(place, each), Path(place.options.logs)
    processes = [
        ServerProcess(place.model, flags, logs / f"workers-{gpu}.log", cuda=place.cuda, gpu=gpu)
        for gpu in range(place.devices)
    ]
    urls = [process.url for process in processes]
    with running(processes) as started:
        place.figures.add("workers", "servers' start", started)
        one = _case(place, "1 server, no workers", _server_config(place, urls[:1], each), each)
        for number in (len(urls), None, 1, 2 * len(urls)):  # what counts most comes first
            name = f"{len(urls)} servers, {number or 'no'} workers"
            config = _server_config(place, urls, each * len(urls))
            many = _case(place, name, config, each * len(urls), number)
            _compare(place, name, one, many)


def _of_engines(place: Place, each: int) -> None:
    config = _with_tools(place, place.config(each))
    one = _case(place, "1 engine in process, no workers", config, each)
    name = f"{place.devices} engines, {place.devices} workers"
    many = _case(place, name, config, each * place.devices, place.devices)
    _compare(place, name, one, many)


def _compare(place: Place, name: str, one: float | None, many: float | None) -> None:
    if one and many:
        share = {
            "times_one": round(many / one, 3),
            "of_ideal": round(many / one / place.devices, 3),
        }
        place.figures.add("workers", f"{name}, over one without workers", share)


def _case(
    place: Place, name: str, config: Config, size: int, number: int | None = None
) -> float | None:
    """Tokens/s, the median of the rounds; None if it failed."""
    speeds: list[float] = []
    with place.noting("workers", f"{name}, {size} conversations") as figures:
        began = perf_counter()
        with _started(place, config, number) as runs:
            figures["start_s"] = round(perf_counter() - began, 1)
            if not place.dry:
                _run(runs, WARM_UP)
            for _ in range(place.options.rounds):
                speeds.append(_run(runs, size) * runs.turn_tokens)
        figures |= {
            "tokens_per_s": round(statistics.median(speeds)),
            "rounds": [round(speed) for speed in speeds],
        }
    return statistics.median(speeds) if speeds else None


@dataclasses.dataclass(frozen=True)
class _Runs:
    """What runs conversations: a session or a pool, and the arguments of `run_tasks` for it."""

    place: Session | WorkerPool
    arguments: dict[str, Any]
    turn_tokens: int


@contextmanager
def _started(place: Place, config: Config, number: int | None) -> Iterator[_Runs]:
    parts: Parts = prepare(config, config_tools(config))
    turn_tokens = 64 if place.dry else 128
    start = Start(turn_tokens)
    if number is None:
        engine_log = place.folder / "engine.log"
        with Session(parts, start=lambda: start(config, engine_log)) as session:
            yield _Runs(session, {}, turn_tokens)
        return
    with WorkerPool(parts, number, log_folder=place.folder, start=start, say=print) as pool:
        arguments = {"make": pool.making({}), "converse": pool.converse}
        yield _Runs(pool, arguments, turn_tokens)


_rows = itertools.count(100_000)


def _run(runs: _Runs, size: int) -> float:
    """Turns/s of so many conversations, until their records are in the run folder, synced."""
    rows = [f"What is item {next(_rows)} worth?" for _ in range(size)]
    tasks = [Task(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(rows)]
    folder = SHARED_MEMORY / f"turntrace-workers-{os.getpid()}"
    progress = Progress(total=size)
    started = perf_counter()
    with RunFolder.create(folder, {}) as store:
        runs.place.run(
            run_tasks(
                tasks,
                runs.place.runtime,
                max_concurrent=size,
                store=store,
                progress=progress,
                **runs.arguments,
            )
        )
    took_s = perf_counter() - started
    shutil.rmtree(folder)
    if (progress.turns, progress.tool_errors) != (TURNS * size, 0):
        raise RuntimeError(f"the conversations did not make the scripted turns: {progress}")
    return TURNS * size / took_s


def _server_config(place: Place, urls: Sequence[str], seats: int) -> Config:
    return _with_tools(
        place, place.config(seats), name="sglang_server", server={"urls": list(urls)}
    )


def _with_tools(place: Place, config: Config, **rollout: Any) -> Config:
    """The config with the load's tool, from a tools.yaml that workers read too."""
    tools = place.folder / "tools.yaml"
    entry = {
        "class_name": "tests.bench.gpu.load.NapTool",
        "config": {"nap_s": NAP_S},
        "tool_schema": TOOL_SCHEMA,
    }
    tools.write_text(json.dumps([entry]))
    assert config.path is not None
    values = json.loads(config.path.read_text())
    values["rollout"] |= rollout
    values["rollout"]["multi_turn"] |= {
        "tool_config_path": str(tools),
        "max_tool_response_length": 256,
    }
    path = place.folder / f"config-{os.getpid()}-{next(_rows)}.yaml"
    path.write_text(json.dumps(values))
    return load_config(path, place.options.overrides)
