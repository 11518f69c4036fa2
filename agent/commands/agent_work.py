"""The work of `turntrace run --agent`: an agent program for each (task, sample), and a summary.

Invariant: exit code 0 means that every record is on disk and none failed because of infrastructure.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.commands.rescore_work import load_score
from agent.commands.run_work import RunRequest
from agent.config.config import Config
from agent.gateway import Gateway
from agent.gateway.boxed import boxed_command
from agent.gateway.programs import (
    AgentCommand,
    ProgramRunner,
    Wrap,
    about_programs,
    prompt_of,
)
from agent.gateway.sessions import Score
from agent.loop.batch import Progress
from agent.loop.tasks import Task, read_tasks
from agent.runs.ending import DONE, INCOMPLETE, exit_code, sigterm_as_interrupt
from agent.runs.progress import Display, shortfall, starting_line, summary
from agent.terminal import say


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
    config = request.config
    samples = config.n(request.validate)
    tasks = 0
    for task in read_tasks(request.tasks, request.limit):
        prompt_of(task)  # a task that no program can be given is told before anything starts
        tasks += 1
    progress = Progress(total=tasks * samples)
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
        more={"agent": about_programs(options.command, options.isolated)},
    )
    try:
        with sigterm_as_interrupt(), gateway:
            runner = _runner(gateway, command, options, config)
            with Display(progress, console, gateway.session_loop.engine) as display:
                work = run_all(runner, _missing(request, gateway, samples), config)
                gateway.session_loop.run(work, poll=display.refresh)
                wall_s = display.wall_s
    except KeyboardInterrupt as interrupt:
        say(
            console,
            f"interrupted: {progress.done} of {progress.total} are in {request.out}; resume with: "
            f"{request.resume_command}",
        )
        return exit_code(interrupt)
    say(console, summary(progress, request.out, wall_s))
    if problem := shortfall(progress):
        say(console, f"{problem}; run them again with: {request.resume_command}")
        return INCOMPLETE
    return DONE


def _runner(
    gateway: Gateway, command: AgentCommand, options: AgentOptions, config: Config
) -> ProgramRunner:
    wrap: Wrap | None = None
    if options.isolated:
        gateway.listen_on_socket()
        wrap = functools.partial(boxed_command, gateway, options.mounts)
    score: Score | None = None
    if options.reward:
        score = load_score(options.reward, gateway.out)
    deadline_s = config.rollout.turntrace.conversation_deadline_s
    return ProgramRunner(gateway, command, score, deadline_s, wrap)


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
