"""`turntrace run`, in order: check what is cheap, open the run folder, start the engine, run, sum up.

Invariant: exit code 0 means that every conversation asked for is on disk and none failed by infrastructure.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from agent.config.config import Config
from agent.engines.servers import SGLangServerEngine
from agent.errors import TaskError
from agent.loop.batch import Progress, run_tasks
from agent.loop.tasks import Task, read_tasks
from agent.loop.users import Interactions
from agent.runs.manifest import command_line, run_manifest
from agent.runs.parts import Parts, config_interactions, config_tools, prepare
from agent.runs.progress import Display, counts, say, shortfall, summary
from agent.runs.session import Session
from conversations.errors import RunFolderError
from conversations.run.open_run import TOKENIZER
from conversations.run.store import (
    RUN,
    TRAJECTORIES,
    UNFINISHED,
    RunFolder,
    read_manifest,
    read_trajectories,
)

DONE, INCOMPLETE, INTERRUPTED, TERMINATED = 0, 1, 130, 143
"""Exit codes; 2 is a user's mistake."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the command line asked for. `argv` is its own words, for run.json and for what to type next.

    After `stop_after_s` seconds of conversations the run is cut off as by Ctrl-C.
    """

    tasks: Path
    out: Path
    config: Config
    limit: int | None
    resume: bool
    force: bool
    validate: bool
    argv: Sequence[str]
    stop_after_s: float | None = None

    @property
    def resume_command(self) -> str:
        """What goes on with this run."""
        return command_line(self.argv if self.resume else [*self.argv, "--resume"])


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def run(request: RunRequest, console: Console) -> int:
    """Runs the tasks into the run folder; returns the exit code. Raises the packages' own errors for a user's mistake."""
    request = with_fresh_seed(request)
    config = request.config
    tools, interactions = config_tools(config), config_interactions(config)
    chosen = _RowChoice(tools or {}, interactions)
    # The whole file once: a bad row is found now, not after hours.
    tasks = read_tasks(request.tasks, request.limit, chosen.check)
    pairs = [(task.id, sample) for task in tasks for sample in range(config.n(request.validate))]
    if chosen.unknown:
        say(
            console,
            f"note: tools_kwargs of some rows name {', '.join(chosen.unknown)}, which the tool config lacks: not offered there",
        )
    parts = prepare(config, tools, interactions)
    target = enough_of(len(pairs), config)
    progress = Progress(total=target)
    with _open_store(request, parts) as store:
        if request.resume:
            _count_earlier(request.out, set(pairs), progress)
        if sum(pair in store.done for pair in pairs) >= target:
            store.close(counts(progress))
            say(console, f"nothing to do: all {target} conversations are in {request.out}")
            return DONE
        return _run_missing(request, parts, store, progress, console)


def enough_of(conversations: int, config: Config) -> int:
    """How many of them are waited for: all, but for the share that `over_sample_rate` says to cut off (verl's formula)."""
    return max(1, int(conversations * (1 - config.rollout.over_sample_rate)))


def with_fresh_seed(request: RunRequest) -> RunRequest:
    """The request with a seed of its own for each start of a run: the same one would sample the same conversations again."""
    return (
        replace(request, config=fresh_seed(request.config, request.out))
        if request.resume
        else request
    )


def fresh_seed(config: Config, folder: Path) -> Config:
    """The config with the seed after that of the run in `folder`, where one is."""
    seed = read_manifest(folder).get("seed") if (folder / RUN).exists() else None
    return replace(config, seed=seed + 1) if isinstance(seed, int) else config


class _RowChoice:
    """The tools and interactions that rows choose, against those of the run. `unknown` collects tools that a row can do without."""

    def __init__(self, offered: Collection[str], interactions: Interactions | None) -> None:
        self._offered = offered
        self._interactions = interactions
        self.unknown: dict[str, None] = {}

    def check(self, task: Task) -> None:
        """Raises TaskError for a row that chooses tools and would be offered none, or an interaction that is not there."""
        if self._interactions is not None and task.interaction_kwargs:
            self._interactions.chosen(task.interaction_kwargs)
        unknown = [name for name in task.tools_kwargs if name not in self._offered]
        if unknown and len(unknown) == len(task.tools_kwargs):
            lack = (
                f"the tool config offers {', '.join(self._offered)}"
                if self._offered
                else "this run has no tools"
            )
            raise TaskError(
                f"tools_kwargs choose {', '.join(unknown)}, but {lack}; give a tool config that has them (--tools FILE), "
                "or take tools_kwargs out of the row"
            )
        self.unknown.update(dict.fromkeys(unknown))


def _count_earlier(folder: Path, asked: set[tuple[str, int]], progress: Progress) -> None:
    """What is in the run folder already counts like what is still to come."""
    if (folder / TRAJECTORIES).exists():
        for trajectory in read_trajectories(folder):
            if (trajectory.task_id, trajectory.sample) in asked:
                progress.count(trajectory)


def _open_store(request: RunRequest, parts: Parts) -> RunFolder:
    manifest = run_manifest(
        parts,
        request.tasks,
        limit=request.limit,
        validate=request.validate,
        argv=request.argv,
    )
    if request.resume:
        return RunFolder.resume(request.out, manifest, force=request.force)
    return RunFolder.create(request.out, manifest)


def _run_missing(
    request: RunRequest,
    parts: Parts,
    store: RunFolder,
    progress: Progress,
    console: Console,
) -> int:
    try:
        with (
            sigterm_as_interrupt(),
            _started(request, parts, store, progress, console) as session,
            Display(progress, console) as display,
        ):
            gc.collect()
            gc.freeze()  # what is loaded now stays: the collector need not walk it at every step of the loop
            try:
                session.run(_conversations(request, session, store, progress), poll=display.refresh)
            finally:
                wall_s = display.wall_s
    except KeyboardInterrupt as interrupt:
        store.close(counts(progress))
        say(console, _interrupted(request, progress, "interrupted"))
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except _StoppedError:
        store.close(counts(progress))
        say(console, _interrupted(request, progress, f"stopped after {request.stop_after_s:g} s"))
        return INCOMPLETE
    store.close(counts(progress))
    say(console, summary(progress, request.out, wall_s))
    return _verdict(request, progress, console)


class _StoppedError(Exception):
    """`stop_after_s` is over."""


async def _conversations(
    request: RunRequest, session: Session, store: RunFolder, progress: Progress
) -> None:
    until = asyncio.timeout(request.stop_after_s)
    try:
        async with until:
            await run_tasks(
                read_tasks(request.tasks, request.limit),
                session.runtime,
                n=request.config.n(request.validate),
                max_concurrent=request.config.rollout.max_num_seqs,
                target=progress.total,
                unfinished=store.unfinished,
                store=store,
                progress=progress,
            )
    except TimeoutError as error:
        if not until.expired():
            raise
        raise _StoppedError from error


@contextmanager
def _started(
    request: RunRequest,
    parts: Parts,
    store: RunFolder,
    progress: Progress,
    console: Console,
) -> Iterator[Session]:
    """The session; a new run folder whose engine never started holds no run afterwards, an earlier one what it held."""
    with ExitStack() as stack:
        try:
            save_tokenizer(request.out, parts.template.tokenizer)
            session = stack.enter_context(_start(request, parts, console))
            _note_served(request, session, store, console)
        except BaseException:
            if request.resume:
                store.close(counts(progress))
            else:
                (request.out / RUN).unlink(missing_ok=True)
            raise
        yield session


def _note_served(request: RunRequest, session: Session, store: RunFolder, console: Console) -> None:
    """Notes in run.json what the servers serve. Raises RunFolderError where a resume finds another model, or other weights."""
    if not isinstance(session.engine, SGLangServerEngine):
        return
    served, earlier = session.engine.served(), store.manifest.get("served") or {}
    if "model_path" not in served:
        say(
            console,
            "note: the server does not say which model it serves: nobody checks that it is that of model_path, or an earlier start's",
        )
    differences = [
        f"{key} was {earlier[key]}, is {served[key]}"
        for key in served
        if key in earlier and earlier[key] != served[key]
    ]
    if differences and not request.force:
        raise RunFolderError(
            f"{request.out} was run on another model: the server's {'; '.join(differences)}; use --force to go on all the same"
        )
    store.note("served", {**earlier, **served})


def save_tokenizer(run: Path, tokenizer: Any) -> None:
    """Into the run folder, before the engine starts: one that cannot be written is known in a second, not after a minute."""
    folder = run / TOKENIZER
    try:
        folder.mkdir(exist_ok=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception for a full disk
        raise RunFolderError(
            f"{folder} cannot be written: {error}; make room there, or choose another --out"
        ) from error


def _start(request: RunRequest, parts: Parts, console: Console) -> Session:
    log = request.out / "engine.log"
    say(console, starting(request.config, log))
    return Session(parts, validate=request.validate, log_path=log)


def starting(config: Config, log: Path) -> str:
    """What is being started, and where it writes: only an engine in process has processes that do."""
    name = config.rollout.name
    return f"starting {name} with {config.model_path}" + (
        f" (log: {log})" if name == "sglang" else ""
    )


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(request: RunRequest, progress: Progress, how: str) -> str:
    cut_off = request.out / UNFINISHED
    unfinished = sum(1 for _ in cut_off.open("rb")) if cut_off.exists() else 0
    return (
        f"{how}: {progress.done} of {progress.total} conversations are in {request.out}, {unfinished} unfinished ones beside them; "
        f"go on with: {request.resume_command}"
    )


def _verdict(request: RunRequest, progress: Progress, console: Console) -> int:
    problem = shortfall(progress)
    if not problem:
        return DONE
    say(console, f"{problem}; run them again with: {request.resume_command}")
    return INCOMPLETE
