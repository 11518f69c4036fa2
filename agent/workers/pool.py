"""The run's side: conversations are handed out as workers have room, and their records come back.

Invariants. A conversation is with one worker at a time, and its record is taken from that worker
or from nowhere: what a dead worker had is run again, and a record that was on its way is not
counted twice. A worker that dies is replaced. A conversation whose worker dies is run again in
ever smaller company: what kills workers is alone in the end and is known by that, and the others
have not failed. Everything here but the start and the end happens on the pool's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

from agent.engines.engine import Generation, SamplingParams
from agent.errors import AgentError, EngineError, TaskError
from agent.loop.boundary import describe
from agent.loop.conversation import Conversation, Counterparts, RanElsewhere
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.runs.loop_thread import LoopThread
from agent.runs.parts import Parts, start_engine
from agent.terminal import visible
from agent.workers.actor import Worker
from agent.workers.cluster import Share, cluster
from agent.workers.programs import Programs
from agent.workers.wire import (
    Answer,
    Kind,
    Setup,
    StartEngine,
    Taken,
    Work,
    encode_work,
    sent_record,
)
from conversations.errors import RecordError
from conversations.trajectory import Trajectory

T = TypeVar("T")

PLACE_S, MOST_PLACE_S = 60.0, 600.0
"""After how long without a place in the cluster a worker is spoken of, and given up while no other
worker is up. A busy machine takes minutes to start a process of Ray.
"""
CUT_S = 30.0
"""How long a worker may take to cut off a conversation before it is given up."""
CLOSE_S = 30.0
"""How long workers may take to end their tools and engines before they are killed."""
TRIES = 3
"""So many times a conversation's worker may die. Then what kills it is looked for."""
SHRINK = 4
"""From then on, a conversation's company is so many times smaller after each death. A worker that
finishes conversations may have as many more: little is lost with it.
"""
MOST_DEATHS = 10
"""A worker that dies so often without finishing a conversation is not started again."""
LONGEST_PAUSE_S = 10.0

VARIABLES = ("OTEL_", "TURNTRACE_", "SGLANG_", "HF_", "TRANSFORMERS_", "PYTHONPATH")
"""Beginnings of the environment variables that workers get from the run."""


class WorkerPool:
    """Starts `number` workers, and blocks until they are up. Close it, or use `with`.

    `address` is a Ray cluster's; None: a local Ray. `log_folder` is the run folder, where engines
    write their logs. `say` is told, in one line, when a worker has died. `start` starts each
    worker's engine. With `programs` each conversation is an agent program. Raises AgentError if a
    worker does not start; then nothing is left running.
    """

    def __init__(
        self,
        parts: Parts,
        number: int,
        address: str | None = None,
        *,
        validate: bool = False,
        log_folder: Path | None = None,
        start: StartEngine = start_engine,
        programs: Programs | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        config = parts.config
        self._setup = Setup(
            config,
            index=0,
            validate=validate,
            working_folder=Path.cwd(),
            folders=tuple(str(Path(folder).resolve()) for folder in sys.path),
            variables={k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
            log_folder=log_folder.resolve() if log_folder else None,
            start=start,
            programs=programs,
        )
        self._say = say
        self._numbers = itertools.count()
        self._starts = itertools.count()
        self._waiting: dict[float, deque[_Job]] = {}
        self._failure: AgentError | None = None
        each_has = config.rollout.name == "sglang"  # an engine of its own, with room for so many
        most = config.rollout.max_num_seqs
        self.max_concurrent = most * number if each_has else most
        self._seats = [_Seat(index, most if each_has else math.inf) for index in range(number)]
        self._serving: list[asyncio.Task[None]] = []
        self._loop = LoopThread()
        self._cluster = contextlib.ExitStack()
        try:
            self._share: Share = self._cluster.enter_context(cluster(config, number, address))
            facts = self._loop.run(self._start_all())
        except BaseException:
            self.close()
            raise
        self.served: dict[str, Any] | None = facts["served"]
        engine = _Elsewhere(facts["engine"])
        self.runtime: Runtime = replace(parts, dispatcher=None, interactions=None).runtime(
            engine, config.sampling(validate)
        )

    # ------------------------------------------------------------------ for the run

    def run(
        self, coroutine: Coroutine[Any, Any, T], *, poll: Callable[[], None] | None = None
    ) -> T:
        """Runs the coroutine on the pool's loop; see `LoopThread.run`."""
        return self._loop.run(coroutine, poll=poll)

    def making(
        self, unfinished: Mapping[tuple[str, int], Trajectory]
    ) -> Callable[[Task, int], Conversation]:
        """What `run_tasks` makes conversations with, to run them in workers.

        Those in `unfinished` are resumed.
        """

        def make(task: Task, sample: int) -> Conversation:
            conversation = Conversation(task, sample, self.runtime, Counterparts(None, None))
            conversation.before = unfinished.get((task.id, sample))
            return conversation

        return make

    async def converse(self, conversation: Conversation) -> None:
        """Has a worker run the conversation; `trajectory_of` is its record then.

        Raises what `agent.loop.batch.Converse` says, TaskError if the row cannot be run, and
        AgentError if no worker is left.
        """
        job = _Job(next(self._numbers), conversation, asyncio.get_running_loop().create_future())
        self._hand_out(job)
        try:
            await asyncio.shield(job.done)
        except asyncio.CancelledError:
            if not await self._cut(job):
                raise

    def processes(self) -> list[tuple[str, int]]:
        """Host name and process id of each worker that is up."""
        return [(seat.host, seat.pid) for seat in self._seats if seat.is_up]

    def so_far(self) -> tuple[int, int]:
        """Turns and sampled tokens of the conversations that workers are running."""
        taken = [seat.taken for seat in self._seats if seat.taken]
        return sum(one.turns for one in taken), sum(one.tokens for one in taken)

    def tokens_in_flight(self) -> int:
        """As an engine's: tokens of turns that are not complete."""
        return sum(seat.taken.tokens_in_flight for seat in self._seats if seat.taken)

    # ------------------------------------------------------------------ handing out

    def _hand_out(self, job: _Job) -> None:
        """Gives the job to the worker with the fewest conversations, or lets it wait for room."""
        if self._failure:
            job.fail(self._failure)
            return
        rooms = [seat for seat in self._seats if seat.has_room(job)]
        if rooms:
            min(rooms, key=lambda seat: len(seat.jobs)).take_on(job)
        else:
            self._waiting.setdefault(job.company, deque()).append(job)

    def _admit_waiting(self) -> None:
        """Hands out what waits and has room now; what needs little company comes last."""
        for company in sorted(self._waiting, reverse=True):
            queue = self._waiting[company]
            while queue and any(seat.has_room(queue[0]) for seat in self._seats):
                self._hand_out(queue.popleft())
            if not queue:
                del self._waiting[company]

    async def _cut(self, job: _Job) -> bool:
        """Cuts the job off; True if it had finished before."""
        job.is_cut = True
        if job.seat is None:
            for queue in self._waiting.values():
                with contextlib.suppress(ValueError):
                    queue.remove(job)
        elif not job.done.done():
            job.seat.cut(job)
            await asyncio.wait((job.done,), timeout=CUT_S)
        is_over = job.done.done() and not job.done.cancelled()
        return is_over and job.done.exception() is None and job.done.result()

    def _settle(self, seat: _Seat, answer: Answer) -> None:
        """A worker's answer about one of its jobs."""
        number, kind, data, evidence, images, files = answer
        job = seat.leave(number)
        text = data.decode()
        try:
            if kind in (Kind.RECORD, Kind.CUT):
                read = sent_record if kind == Kind.RECORD else Trajectory.from_line
                record = read(text)
                job.conversation.elsewhere = RanElsewhere(record, evidence, images, files)
                job.end(is_whole=kind == Kind.RECORD)
                seat.deaths = 0
                seat.finished += 1
            else:
                job.fail(_ERRORS[kind](text))
        except RecordError as error:
            job.fail(error)

    # ------------------------------------------------------------------ workers

    async def _start_all(self) -> dict[str, Any]:
        """Starts the workers, all at once; returns what the first said of its engine."""
        import ray

        try:
            async with asyncio.TaskGroup() as group:
                started = [group.create_task(self._start(seat)) for seat in self._seats]
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]
            if isinstance(first, ray.exceptions.RayError):
                why = f"a worker died while it started: {_one_line(first)}"
                raise AgentError(why) from None
            raise first from None
        loop = asyncio.get_running_loop()
        self._serving = [loop.create_task(self._serve(seat)) for seat in self._seats]
        return started[0].result()

    async def _start(self, seat: _Seat) -> dict[str, Any]:
        """Starts the seat's worker. Raises AgentError, or a RayError if it died meanwhile."""
        import ray

        options = {
            "num_cpus": self._share.cpus,
            "num_gpus": self._share.gpus,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }
        seat.actor = ray.remote(Worker).options(**options).remote()
        seat.host, seat.pid = await self._placed(seat)
        setup = _setup_of(self._setup, seat.index, next(self._starts))
        facts: dict[str, Any] = json.loads(await seat.actor.start.remote(setup))
        if "error" in facts:
            raise AgentError(f"{seat} did not start: {facts['error']}")
        seat.is_up = True
        self._admit_waiting()
        return facts

    async def _placed(self, seat: _Seat) -> tuple[str, int]:
        """Host name and process id, as soon as Ray has a place for the worker."""
        placed = asyncio.ensure_future(_answer(seat.actor.place.remote()))
        began_s = perf_counter()
        try:
            while not (await asyncio.wait((placed,), timeout=PLACE_S))[0]:
                if any(other.is_up for other in self._seats):
                    continue
                waited_s = perf_counter() - began_s
                problem = (
                    f"worker {seat.index} has no place after {waited_s:.0f} s: it needs "
                    f"{self._share} that Ray has free, and time to start"
                )
                if waited_s >= MOST_PLACE_S:
                    raise AgentError(problem)
                self._say(f"note: {problem}")
            found: tuple[str, int] = placed.result()
            return found
        finally:
            placed.cancel()

    async def _serve(self, seat: _Seat) -> None:
        """Takes what the seat's worker finishes, and starts another whenever it dies."""
        import ray

        while True:
            try:
                if seat.actor is None:
                    await self._start(seat)
                await self._listen(seat)
            except (ray.exceptions.RayError, AgentError) as error:
                if isinstance(error, ray.exceptions.RayTaskError):  # not its death: a bug of ours
                    self._fail(AgentError(f"{seat} failed: {_one_line(error)}"))
                    return
                seat.deaths += 1
                self._lose(seat, error)
                if seat.deaths >= MOST_DEATHS:
                    self._retire(seat, error)
                    return
            except Exception as error:  # a bug of ours too: the run must not wait for ever
                self._fail(AgentError(f"{seat}: {describe(error)}"))
                return
            await asyncio.sleep(_pause_s(seat.deaths))

    async def _listen(self, seat: _Seat) -> None:
        """Takes answers until the worker dies: then it raises a RayError."""
        asked = seat.actor.take.remote()
        while True:
            taken: Taken = await asked
            asked = seat.actor.take.remote()  # the worker goes on while these are read
            seat.taken = replace(taken, answers=[])
            for answer in taken.answers:
                self._settle(seat, answer)
            self._admit_waiting()

    def _lose(self, seat: _Seat, error: Exception) -> None:
        """The seat's worker is dead: its conversations are run again."""
        jobs, was = seat.emptied()
        again = [job for job in jobs if not job.is_cut]
        self._say(
            f"note: {was} died ({_one_line(error)}); {len(again)} conversations run again, "
            "and another worker is started"
        )
        for job in jobs:
            if job.is_cut:
                job.end(is_whole=False)
            elif job.has_failed(len(jobs)):
                job.conversation.ending.fail(
                    f"its worker died {job.deaths} times, the last time with this conversation "
                    f"alone: {_one_line(error)}",
                    "engine_error",
                )
                job.conversation.clock.stop()
                job.end(is_whole=True)
            else:
                self._hand_out(job)

    def _retire(self, seat: _Seat, error: Exception) -> None:
        """The seat stays empty. Without any other, the run fails."""
        self._seats.remove(seat)
        line = f"worker {seat.index} died {seat.deaths} times without finishing a conversation"
        if self._seats:
            self._say(f"note: {line}: the run continues with {len(self._seats)}")
        else:
            self._fail(AgentError(f"{line}, and no other is left; the last: {_one_line(error)}"))

    def _fail(self, error: AgentError) -> None:
        """Ends the run: every conversation that is under way raises the error."""
        self._failure = error
        waiting = [job for queue in self._waiting.values() for job in queue]
        self._waiting.clear()
        for job in [*waiting, *(job for seat in self._seats for job in seat.jobs.values())]:
            job.fail(error)

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Ends workers, tools, engines, and a Ray that was started. Safe to call twice."""
        if self._loop.is_closed:
            return
        try:
            self._loop.run(self._end())
        finally:
            self._loop.close()
            self._cluster.close()

    async def _end(self) -> None:
        for task in self._serving:
            task.cancel()
        up = [seat.actor for seat in self._seats if seat.is_up]
        if closing := [asyncio.ensure_future(_answer(actor.close.remote())) for actor in up]:
            await asyncio.wait(closing, timeout=CLOSE_S)
        for seat in self._seats:
            if seat.actor is not None:
                _kill(seat.actor)
        # Read what they raised, of workers that are dead already: asyncio would print it.
        await asyncio.gather(*closing, *self._serving, return_exceptions=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(eq=False, slots=True)
class _Job:
    """A conversation on its way through the workers.

    `done` is True if it came to its end, False if it was cut off. `company` is how many
    conversations its worker may have, itself included.
    """

    number: int
    conversation: Conversation
    done: asyncio.Future[bool]
    seat: _Seat | None = None
    is_cut: bool = False
    deaths: int = 0
    company: float = math.inf

    def line(self) -> tuple[int, bytes]:
        """The job as a worker gets it."""
        one = self.conversation
        return self.number, encode_work(Work(one.task, one.sample, one.before))

    def has_failed(self, crowd: int) -> bool:
        """Notes that its worker died with `crowd` conversations; True if this one is at fault."""
        self.deaths += 1
        if crowd == 1 and self.deaths >= TRIES:
            return True
        if self.deaths >= TRIES:
            self.company = max(1, min(self.company, crowd) // SHRINK)
        return False

    def end(self, *, is_whole: bool) -> None:
        if not self.done.done():
            self.done.set_result(is_whole)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits may be gone: asyncio would print it


@dataclass(eq=False, slots=True)
class _Seat:
    """A worker's place in the run: the worker, and whoever replaces it.

    `most` is how many conversations it may have. `deaths` counts those since it last answered,
    `finished` the conversations that came to their end since the worker started.
    """

    index: int
    most: float
    actor: Any = None
    host: str = ""
    pid: int = 0
    is_up: bool = False
    deaths: int = 0
    finished: int = 0
    taken: Taken | None = None
    jobs: dict[int, _Job] = field(default_factory=dict)
    _companies: Counter[float] = field(default_factory=Counter)
    _outbox: list[tuple[int, bytes]] = field(default_factory=list)
    _cuts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" (pid {self.pid} on {self.host})" if self.pid else ""
        return f"worker {self.index}{where}"

    def has_room(self, job: _Job) -> bool:
        """Whether it may have the job: neither it nor any that it has wants less company.

        What must be alone is alone; others may have so many more as the worker has finished.
        """
        company = min(job.company, *self._companies, math.inf)
        room = company if company == 1 else company + self.finished
        return self.is_up and len(self.jobs) < min(self.most, room)

    def take_on(self, job: _Job) -> None:
        """Sends the job to the worker, with all that are taken on in this turn of the loop."""
        job.seat = self
        self.jobs[job.number] = job
        self._companies[job.company] += 1
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._send)
        self._outbox.append(job.line())

    def cut(self, job: _Job) -> None:
        """Tells the worker to cut the job off."""
        if not self._cuts:
            asyncio.get_running_loop().call_soon(self._send)
        self._cuts.append(job.number)

    def _send(self) -> None:
        """What is lost with a dead worker is not missed: its jobs are run again."""
        outbox, self._outbox = self._outbox, []
        cuts, self._cuts = self._cuts, []
        if self.actor is not None and outbox:
            self.actor.begin.remote(outbox)
        if self.actor is not None and cuts:
            self.actor.cut.remote(cuts)

    def leave(self, number: int) -> _Job:
        """The job, which is no longer here."""
        job = self.jobs.pop(number)
        job.seat = None
        self._companies[job.company] -= 1
        if not self._companies[job.company]:
            del self._companies[job.company]
        return job

    def emptied(self) -> tuple[list[_Job], str]:
        """The jobs of a worker that is dead, and its name. Ray may think that it lives."""
        was = str(self)
        jobs = [self.leave(number) for number in list(self.jobs)]
        if self.actor is not None:
            _kill(self.actor)
        self.actor, self.taken, self.is_up, self.pid = None, None, False, 0
        self.finished = 0
        self._outbox, self._cuts = [], []
        return jobs, was


class _Elsewhere:
    """The workers' engine, as the run's own process knows it: by its description."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    async def generate(
        self, prompt_ids: Any, sampling: SamplingParams, *, request_id: str, images: Any = ()
    ) -> Generation:
        raise EngineError("the engine is in the workers")

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


def _setup_of(setup: Setup, index: int, starts: int) -> Setup:
    """The setup of one start of a worker.

    Each start samples with a seed of its own. Servers are shared by all; each worker's first is
    another.
    """
    config, server = setup.config, setup.config.rollout.server
    if urls := server.urls:
        turned = [*urls[index % len(urls) :], *urls[: index % len(urls)]]
        server = server.model_copy(update={"urls": turned})
    rollout = config.rollout.model_copy(update={"server": server})
    config = replace(config, rollout=rollout, seed=config.seed + _SEEDS_APART * starts)
    return replace(setup, config=config, index=index)


_SEEDS_APART = 7919
"""A resumed run's seed is one more than the last: those of its workers must be others too."""

_ERRORS: dict[str, Callable[[str], Exception]] = {
    Kind.LOST: RecordError,
    Kind.REFUSED: TaskError,
    Kind.BROKEN: lambda text: AgentError(f"a worker failed: {text}"),
}


async def _answer(reference: Awaitable[T]) -> T:
    """An object reference as a coroutine, which asyncio can wait for."""
    return await reference


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)


def _pause_s(deaths: int) -> float:
    """None before the first replacement, then ever longer."""
    return min(LONGEST_PAUSE_S, 0.25 * 2**deaths) if deaths > 1 else 0.0


def _one_line(error: Exception) -> str:
    """What Ray says of a death, without its ids and advice; another error's own text."""
    text = " ".join(str(error).split())
    if "temporarily unavailable" in text:
        return "it can no longer be reached"
    detail = re.search(r"exit detail: (.*?)\.(?: |$)|because (its node has died)", text)
    return visible(next(filter(None, detail.groups())) if detail else text)[:300]
