"""The work of `turntrace run --agent`: an agent program for each (task, sample), and a summary.

Invariant: exit code 0 means that every record is on disk and none failed because of infrastructure.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from agent.commands.rescore_work import load_function, load_score, parts_of
from agent.commands.run_work import RunRequest, refuse_images
from agent.config.config import Config
from agent.errors import AgentError
from agent.gateway import Gateway
from agent.gateway.boxed import boxed_command
from agent.gateway.gateway import gateway_config, gateway_manifest
from agent.gateway.keeper import Keeper
from agent.gateway.programs import (
    AgentCommand,
    ProgramRunner,
    Wrap,
    about_programs,
    prompt_of,
)
from agent.gateway.sessions import Score
from agent.loop.batch import Progress, run_tasks
from agent.loop.boundary import describe
from agent.loop.conversation import Conversation
from agent.loop.tasks import Task, read_tasks
from agent.runs.ending import DONE, INCOMPLETE, exit_code, sigterm_as_interrupt
from agent.runs.manifest import save_tokenizer
from agent.runs.parts import prepare
from agent.runs.progress import (
    Display,
    counts,
    notes_on_turns_at_once,
    shortfall,
    starting_line,
    summary,
)
from agent.terminal import say
from agent.workers.programs import Programs, write_program
from conversations.run.store import RUN, TRAJECTORIES, RunFolder, read_trajectories

if TYPE_CHECKING:
    from agent.workers.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What `--agent` and its companions say.

    `reward` is `module:function` or `file.py:function`, `mounts` are shown to isolated programs.
    """

    command: str
    reward: str | None = None
    isolated: bool = False
    mounts: tuple[Path, ...] = ()


def run_agents(request: RunRequest, options: AgentOptions, console: Console) -> int:
    """Runs the programs; returns the exit code.

    Raises the packages' own errors for a user's mistake.
    """
    command = AgentCommand.of(options.command)
    for mount in options.mounts:
        if not mount.exists():
            raise AgentError(f"--agent-mount {mount}: is not there")
    if options.mounts and not options.isolated:
        raise AgentError("--agent-mount: needs --agent-sandbox; without it a program sees all")
    reward = load_function(options.reward) if options.reward else None
    config = request.config
    samples = config.n(request.validate)
    # A task that no program can be given is told before anything starts.
    rows = read_tasks(request.tasks, request.limit, lambda task: command.argv(prompt_of(task)))
    progress = Progress(total=sum(1 for _ in rows) * samples)
    for note in notes_on_turns_at_once(config):
        say(console, f"note: {note}")
    if request.workers is not None:
        return _run_in_workers(request, request.workers, options, command, progress, console)
    say(console, starting_line(config, request.out / "engine.log"))
    gateway = Gateway(
        config,
        request.out,
        admin_key=secrets.token_hex(16),  # nobody's: a program may not end its own session
        resume=request.resume,
        force=request.force,
        tasks=request.tasks,
        limit=request.limit,
        validate=request.validate,
        argv=request.argv,
        progress=progress,
        more={"agent": about_programs(options.command, options.isolated, options.reward)},
    )
    try:
        with (
            sigterm_as_interrupt(),
            gateway,
            _runner(gateway, command, options, config, reward) as runner,
            Display(progress, console, gateway.session_loop.engine) as display,
        ):
            work = run_all(runner, _missing(request, gateway, samples), config)
            gateway.session_loop.run(work, poll=display.refresh)
            wall_s = display.wall_s
    except KeyboardInterrupt as interrupt:
        return _interrupted(request, progress, interrupt, console)
    return _sum_up(request, progress, wall_s, console)


def _interrupted(
    request: RunRequest, progress: Progress, interrupt: KeyboardInterrupt, console: Console
) -> int:
    if (request.out / RUN).exists():
        kept = f"{progress.done} of {progress.total} are in {request.out}"
        say(console, f"interrupted: {kept}; resume with: {request.resume_command}")
    else:
        say(console, f"interrupted before a program ran; {request.out} holds no run yet")
    return exit_code(interrupt)


def _sum_up(request: RunRequest, progress: Progress, wall_s: float, console: Console) -> int:
    say(console, summary(progress, request.out, wall_s))
    if problem := shortfall(progress):
        say(console, f"{problem}; run them again with: {request.resume_command}")
        return INCOMPLETE
    return DONE


@contextlib.contextmanager
def _runner(
    gateway: Gateway,
    command: AgentCommand,
    options: AgentOptions,
    config: Config,
    reward: Callable[..., Any] | None,
) -> Iterator[ProgramRunner]:
    wrap: Wrap | None = None
    if options.isolated:
        gateway.listen_on_socket()
        wrap = functools.partial(boxed_command, gateway, options.mounts)
    score: Score | None = parts_of(reward, gateway.out) if reward else None
    deadline_s = config.rollout.turntrace.conversation_deadline_s
    keeper = Keeper()
    if gateway.socket:
        keeper.made(str(gateway.socket.parent))
    try:
        yield ProgramRunner(gateway, command, score, deadline_s, wrap, keeper)
    finally:
        keeper.close()


# ---------------------------------------------------------------------- in workers


def _run_in_workers(
    request: RunRequest,
    number: int,
    options: AgentOptions,
    command: AgentCommand,
    progress: Progress,
    console: Console,
) -> int:
    """The programs in so many workers, each with a gateway of its own; returns the exit code."""
    from agent.workers.pool import WorkerPool

    config = gateway_config(request.config)
    out = request.out.resolve()
    say(console, starting_line(config, request.out / "engine-*.log", workers=number))
    programs = Programs(
        command,
        out,
        functools.partial(load_score, options.reward, out) if options.reward else None,
        config.rollout.turntrace.conversation_deadline_s,
        options.isolated,
        options.mounts,
    )
    folder = _open_folder(request, config, options, progress)
    if progress.total == len(folder.done):
        folder.close(counts(progress))
        say(console, f"nothing to do: all {progress.total} programs have ended in {request.out}")
        return DONE
    try:
        with sigterm_as_interrupt(), contextlib.ExitStack() as stack:
            try:
                parts = prepare(config)
                refuse_images(parts)
                save_tokenizer(out, parts.template.tokenizer)
                folder.note("call_format", parts.template.format_entry())
                pool = stack.enter_context(
                    WorkerPool(
                        parts,
                        number,
                        request.ray,
                        validate=request.validate,
                        log_folder=out,
                        programs=programs,
                        say=functools.partial(say, console),
                    )
                )
            except Exception:  # after Ctrl-C the folder may be resumed
                if not request.resume:  # a new folder holds no run
                    folder.close()
                    (out / RUN).unlink(missing_ok=True)
                raise
            display = stack.enter_context(Display(progress, console, pool))

            def poll() -> None:
                progress.turns_elsewhere, progress.tokens_elsewhere = pool.so_far()
                display.refresh()

            pool.run(_in_pool(pool, request, config, folder, progress, console), poll=poll)
            wall_s = display.wall_s
    except KeyboardInterrupt as interrupt:
        return _interrupted(request, progress, interrupt, console)
    finally:
        folder.close(counts(progress))
    return _sum_up(request, progress, wall_s, console)


def _open_folder(
    request: RunRequest, config: Config, options: AgentOptions, progress: Progress
) -> RunFolder:
    """The run folder, the same as that of a run without workers; counts what it has."""
    more = {
        "agent": about_programs(options.command, options.isolated, options.reward),
        "workers": request.workers,
    }
    manifest = gateway_manifest(
        config,
        request.tasks,
        limit=request.limit,
        validate=request.validate,
        argv=request.argv,
        more=more,
    )
    if not request.resume:
        return RunFolder.create(request.out, manifest)
    folder = RunFolder.resume(request.out, manifest, force=request.force)
    folder.keep_journal(())  # its programs are gone
    if (request.out / TRAJECTORIES).exists():
        for trajectory in read_trajectories(request.out):
            progress.count(trajectory)
    return folder


async def _in_pool(
    pool: WorkerPool,
    request: RunRequest,
    config: Config,
    folder: RunFolder,
    progress: Progress,
    console: Console,
) -> None:
    async def converse(conversation: Conversation) -> None:
        """Has a worker run the program; its files are there before its record."""
        try:
            await pool.converse(conversation)
        finally:
            if ran := conversation.elsewhere:
                try:
                    write_program(folder.path, ran.record.id, ran.files)
                except OSError as error:  # this sample's loss, not the run's
                    say(console, f"{ran.record.id}: its files are lost: {describe(error)}")

    await run_tasks(
        read_tasks(request.tasks, request.limit),
        pool.runtime,
        n=config.n(request.validate),
        max_concurrent=pool.max_concurrent,
        make=pool.making({}),
        converse=converse,
        store=folder,
        progress=progress,
    )


# ---------------------------------------------------------------------- in this process


def _missing(request: RunRequest, gateway: Gateway, samples: int) -> Iterator[tuple[Task, int]]:
    for task in read_tasks(request.tasks, request.limit):
        for sample in range(samples):
            if (task.id, sample) not in gateway.folder.done:
                yield task, sample


async def run_all(runner: ProgramRunner, pairs: Iterator[tuple[Task, int]], config: Config) -> None:
    """Runs the program for each pair, `max_num_seqs` at a time.

    A record that cannot be written ends the run, as in any run.
    """
    slots = asyncio.Semaphore(config.rollout.max_num_seqs)
    try:
        async with asyncio.TaskGroup() as group:
            while await slots.acquire() and (pair := next(pairs, None)):
                running = group.create_task(_one(runner, *pair))
                running.add_done_callback(lambda _: slots.release())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _one(runner: ProgramRunner, task: Task, sample: int) -> None:
    await runner.run(task, sample)
