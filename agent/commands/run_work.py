"""The work of `turntrace run`: prepare, open, run, sum up.

Invariant: exit code 0 means that every conversation is on disk and none failed because of
infrastructure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.config.config import Config
from agent.engines.servers import SGLangServerEngine
from agent.errors import ConfigError, TaskError
from agent.loop.batch import Converse, Make, Progress, converse_observed, run_tasks
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task, read_tasks
from agent.loop.users import Interactions
from agent.replay.continuation import continuing
from agent.runs.collector import settle_collector
from agent.runs.ending import DONE, INCOMPLETE, exit_code, sigterm_as_interrupt
from agent.runs.manifest import (
    command_line,
    fresh_seed,
    processor_entry,
    run_manifest,
    save_tokenizer,
)
from agent.runs.parts import Parts, config_interactions, config_tools, prepare
from agent.runs.progress import (
    Display,
    counts,
    notes_on_turns_at_once,
    shortfall,
    starting_line,
    summary,
)
from agent.runs.session import KeptSession, Session
from agent.terminal import say
from conversations.errors import RunFolderError
from conversations.run.store import RUN, TRAJECTORIES, UNFINISHED, RunFolder, read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tools.toolset import ToolSet


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the command line asks for.

    `argv` are its words, for run.json and for the advice how to resume.

    After `stop_after_s` seconds of conversations the run stops, as after Ctrl-C. With `workers`
    the conversations run in so many processes, on the Ray cluster at the address `ray`, by default
    on a Ray of their own. `more` are further fields of run.json. `again` says how to resume, where
    that is not this command with `--resume`. `session` is kept for several runs: see `KeptSession`.

    Raises ValueError for a kept session with workers, whose engines are elsewhere.
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
    more: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    ray: str | None = None
    again: str | None = None
    session: KeptSession | None = None

    def __post_init__(self) -> None:
        if self.session and self.workers is not None:
            raise ValueError("a kept session and workers: only one of them runs conversations")

    @property
    def resume_command(self) -> str:
        """What resumes this run."""
        if self.again:
            return self.again
        return command_line(self.argv if self.resume else [*self.argv, "--resume"])


def run_request(request: RunRequest, console: Console) -> int:
    """Runs the tasks into the run folder; returns the exit code.

    Raises the packages' own errors for a user's mistake.
    """
    plan = prepare_run(request)
    for note in plan.notes:
        say(console, f"note: {note}")
    with open_folder(plan) as folder:
        progress = Progress(total=plan.target)
        if request.resume:
            _count_earlier(plan, progress)
        if len(folder.done & plan.asked) >= plan.target:
            folder.close(counts(progress))
            say(console, f"nothing to do: all {plan.target} conversations are in {request.out}")
            return DONE
        return run_missing(plan, folder, progress, console)


# ---------------------------------------------------------------------- prepare


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run whose tools, interactions and rows are loaded and checked.

    What takes seconds is still to come.

    `asked` are the (task, sample) pairs, `target` how many of them the run waits for.
    """

    request: RunRequest
    tools: ToolSet | None
    interactions: Interactions | None
    asked: frozenset[tuple[str, int]]
    target: int
    notes: tuple[str, ...]


def prepare_run(request: RunRequest) -> RunPlan:
    """Loads and checks what is quick.

    Reads the whole task file: a bad row is found now, not after hours.

    A resumed run gets a new seed, as the same one would sample the same conversations again; where
    a kept session's engine is running, the seed is that engine's.
    """
    if request.session and request.session.seed is not None:
        request = replace(request, config=replace(request.config, seed=request.session.seed))
    elif request.resume:
        request = replace(request, config=fresh_seed(request.config, request.out))
    config = request.config
    tools, interactions = config_tools(config), config_interactions(config)
    rows = _RowChecks(tools or {}, interactions)
    samples = range(config.n(request.validate))
    asked = frozenset(
        (task.id, sample)
        for task in read_tasks(request.tasks, request.limit, rows.check)
        for sample in samples
    )
    target = enough_of(len(asked), config)
    asks_model = any(tool.asks_model for tool in (tools or {}).values())
    at_once = notes_on_turns_at_once(config) if asks_model else []
    notes = (*_schema_notes(tools), *rows.notes(), *at_once)
    return RunPlan(request, tools, interactions, asked, target, notes)


def _schema_notes(tools: ToolSet | None, most: int = 3) -> Iterator[str]:
    """What models will stumble over in the tools' schemas."""
    warnings = tools.warnings if tools else []
    yield from warnings[:most]
    if (more := len(warnings) - most) > 0:
        yield f"{more} more such warnings: `turntrace tools check` shows them"


def enough_of(conversations: int, config: Config) -> int:
    """How many conversations a run waits for: `over_sample_rate` as verl's formula has it."""
    return max(1, int(conversations * (1 - config.rollout.over_sample_rate)))


class _RowChecks:
    """Checks the tools and interactions that rows choose against those of the run."""

    def __init__(self, offered: Collection[str], interactions: Interactions | None) -> None:
        self._offered = offered
        self._interactions = interactions
        self._unknown_tools: dict[str, None] = {}
        self._without_user = 0

    def check(self, task: Task) -> None:
        """Raises TaskError for a row that cannot get what it chooses.

        That is: none of its tools is there, or its interaction is not.
        """
        if task.interaction_kwargs:
            if self._interactions is None:
                self._without_user += 1
            else:
                self._interactions.chosen(task.interaction_kwargs)
        unknown = [name for name in task.tools_kwargs if name not in self._offered]
        if unknown and len(unknown) == len(task.tools_kwargs):
            raise TaskError(
                f"the row chooses the tools {', '.join(unknown)}, but {self._offer()}; give a tool "
                "config that has them (--tools FILE), or take tools_kwargs and tool_selection "
                "out of the row"
            )
        self._unknown_tools.update(dict.fromkeys(unknown))

    def _offer(self) -> str:
        if not self._offered:
            return "this run has no tools"
        return f"the tool config offers {', '.join(self._offered)}"

    def notes(self) -> Iterator[str]:
        """What the user should know about rows that can be run."""
        if self._unknown_tools:
            yield (
                f"some rows choose the tools {', '.join(self._unknown_tools)}, which the tool "
                "config does not have: they are not offered"
            )
        if self._without_user:
            yield (
                "this run has no interactions, so no user answers in rows with interaction_kwargs "
                f"({self._without_user} here); multi_turn.interaction_config_path names them"
            )


# ---------------------------------------------------------------------- open


def open_folder(plan: RunPlan) -> RunFolder:
    """The run folder, new or resumed, with its run.json."""
    request = plan.request
    manifest = run_manifest(
        request.config,
        request.tasks,
        plan.tools,
        plan.interactions,
        limit=request.limit,
        validate=request.validate,
        argv=request.argv,
    )
    manifest |= {"workers": request.workers, **request.more}
    if request.resume:
        return RunFolder.resume(request.out, manifest, force=request.force)
    return RunFolder.create(request.out, manifest)


def _count_earlier(plan: RunPlan, progress: Progress) -> None:
    """Counts the trajectories that are in the run folder already."""
    folder = plan.request.out
    if (folder / TRAJECTORIES).exists():
        for trajectory in read_trajectories(folder):
            if (trajectory.task_id, trajectory.sample) in plan.asked:
                progress.count(trajectory)


# ---------------------------------------------------------------------- run


class _StoppedError(Exception):
    """`stop_after_s` is over."""


def run_missing(plan: RunPlan, folder: RunFolder, progress: Progress, console: Console) -> int:
    """Runs the conversations that the folder lacks, and sums up. Returns the exit code."""
    request = plan.request
    try:
        with (
            sigterm_as_interrupt(),
            _started(plan, folder, progress, console) as place,
            Display(progress, console, place.engine) as display,
        ):
            settle_collector()

            def poll() -> None:
                progress.turns_elsewhere, progress.tokens_elsewhere = place.so_far()
                display.refresh()

            place.run(_conversations(plan, place, folder, progress), poll=poll)
            wall_s = display.wall_s
    except KeyboardInterrupt as interrupt:
        folder.close(counts(progress))
        say(console, _cut_short(request, progress, "interrupted"))
        return exit_code(interrupt)
    except _StoppedError:
        folder.close(counts(progress))
        say(console, _cut_short(request, progress, f"stopped after {request.stop_after_s:g} s"))
        return INCOMPLETE
    folder.close(counts(progress))
    return _sum_up(request, progress, wall_s, console)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the conversations run: in this process, or in workers.

    `making` gives what makes conversations, from the unfinished ones; `engine` may know
    `tokens_in_flight`; `so_far` are turns and tokens of live conversations in other processes.
    """

    run: Callable[..., None]
    runtime: Runtime
    making: Callable[[Mapping[tuple[str, int], Trajectory]], Make]
    converse: Converse
    max_concurrent: int
    engine: object
    served: Mapping[str, Any] | None
    so_far: Callable[[], tuple[int, int]]


@contextmanager
def _started(
    plan: RunPlan, folder: RunFolder, progress: Progress, console: Console
) -> Iterator[_Place]:
    """The place. If it does not start, a new folder holds no run, a resumed one what it held."""
    request = plan.request
    with contextlib.ExitStack() as stack:
        try:
            parts = prepare(request.config, plan.tools, plan.interactions)
            save_tokenizer(request.out, parts.template.tokenizer)
            if plan.tools:
                _note_call_format(request, parts.template, folder)
            if parts.images:
                folder.note("image_processor", processor_entry(parts.template))
                parts.images.look_in(folder.image_store())
            if request.workers is not None:
                refuse_images(parts)
            if request.workers is None:
                place = _here(request, parts, stack, console)
            else:
                place = _in_workers(request, request.workers, parts, stack, console)
            if place.served is not None:
                _note_served(request, place.served, folder, console)
        except BaseException:
            _forget(request, folder, progress)
            raise
        yield place


def refuse_images(parts: Parts) -> None:
    """Raises ConfigError if the model sees images: workers do not send them."""
    if parts.images:
        raise ConfigError(
            f"--workers: {parts.config.model_path} sees images, which workers do not send with "
            "their records; leave --workers out"
        )


def _here(
    request: RunRequest, parts: Parts, stack: contextlib.ExitStack, console: Console
) -> _Place:
    def start() -> Session:
        log = request.out / "engine.log"
        say(console, starting_line(request.config, log))
        return Session(parts, validate=request.validate, log_path=log)

    kept = request.session
    session = kept.get(parts, start) if kept else stack.enter_context(start())
    runtime = session.runtime_with(request.config.sampling(request.validate))
    engine = session.engine
    return _Place(
        run=session.run,
        runtime=runtime,
        making=partial(continuing, runtime),
        converse=converse_observed,
        max_concurrent=request.config.rollout.max_num_seqs,
        engine=engine,
        served=engine.served() if isinstance(engine, SGLangServerEngine) else None,
        so_far=lambda: (0, 0),
    )


def _in_workers(
    request: RunRequest, number: int, parts: Parts, stack: contextlib.ExitStack, console: Console
) -> _Place:
    from agent.workers.pool import WorkerPool

    say(console, starting_line(request.config, request.out / "engine-*.log", workers=number))
    pool = stack.enter_context(
        WorkerPool(
            parts,
            number,
            request.ray,
            validate=request.validate,
            log_folder=request.out,
            say=partial(say, console),
        )
    )
    return _Place(
        run=pool.run,
        runtime=pool.runtime,
        making=pool.making,
        converse=pool.converse,
        max_concurrent=pool.max_concurrent,
        engine=pool,
        served=pool.served,
        so_far=pool.so_far,
    )


def _note_call_format(request: RunRequest, template: ChatTemplate, folder: RunFolder) -> None:
    """Writes the call format into run.json. Raises RunFolderError if a resumed run had another."""
    entry, earlier = template.format_entry(), folder.manifest.get("call_format") or {}
    if earlier and earlier.get("name") != entry["name"] and not request.force:
        raise RunFolderError(
            f"{request.out} was made with the call format {earlier.get('name')}, now it is "
            f"{entry['name']}; use --force to continue"
        )
    folder.note("call_format", entry)


def _forget(request: RunRequest, folder: RunFolder, progress: Progress) -> None:
    if request.resume:
        folder.close(counts(progress))
    else:
        (request.out / RUN).unlink(missing_ok=True)


def _note_served(
    request: RunRequest, served: Mapping[str, Any], folder: RunFolder, console: Console
) -> None:
    """Writes into run.json what the servers serve.

    Raises RunFolderError if a resumed run was made with another model, or with other weights.
    """
    earlier = folder.manifest.get("served") or {}
    if "model_path" not in served:
        say(
            console,
            "note: the server does not report its model, so it cannot be compared with model_path",
        )
    differences = [
        f"{key} was {earlier[key]}, is {served[key]}"
        for key in served
        if key in earlier and earlier[key] != served[key]
    ]
    if differences and not request.force:
        raise RunFolderError(
            f"{request.out} was made with another model: the server's {'; '.join(differences)}; "
            "use --force to continue"
        )
    folder.note("served", {**earlier, **served})


async def _conversations(
    plan: RunPlan, place: _Place, folder: RunFolder, progress: Progress
) -> None:
    request = plan.request
    deadline = asyncio.timeout(request.stop_after_s)
    try:
        async with deadline:
            await run_tasks(
                read_tasks(request.tasks, request.limit),
                place.runtime,
                n=request.config.n(request.validate),
                max_concurrent=place.max_concurrent,
                target=plan.target,
                make=place.making(folder.unfinished),
                converse=place.converse,
                store=folder,
                progress=progress,
            )
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise _StoppedError from error


# ---------------------------------------------------------------------- sum up


def _sum_up(request: RunRequest, progress: Progress, wall_s: float, console: Console) -> int:
    say(console, summary(progress, request.out, wall_s))
    problem = shortfall(progress)
    if not problem:
        return DONE
    say(console, f"{problem}; run them again with: {request.resume_command}")
    return INCOMPLETE


def _cut_short(request: RunRequest, progress: Progress, how: str) -> str:
    file = request.out / UNFINISHED
    unfinished = sum(1 for _ in file.open("rb")) if file.exists() else 0
    return (
        f"{how}: {progress.done} of {progress.total} conversations are in {request.out}, "
        f"{unfinished} unfinished ones beside them; resume with: {request.resume_command}"
    )
