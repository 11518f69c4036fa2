"""The worker's side: a process with a session of its own, which runs the conversations it is given.

Ray makes an actor of `Worker`. Invariants: conversations live on the session's loop, and nowhere
else; each work that was begun is answered once, whatever it raises; no method raises what foreign
code raised.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sys
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent.errors import AgentError
from agent.loop.batch import bare_record, converse_observed, sampled_tokens
from agent.loop.boundary import describe
from agent.loop.conversation import Conversation, Counterparts, SentFiles
from agent.loop.record import evidence_file, image_files, trajectory_of
from agent.loop.runtime import Runtime
from agent.packages import not_installed
from agent.replay.continuation import continued
from agent.runs.collector import settle_collector
from agent.runs.parts import config_interactions, config_tools, prepare
from agent.runs.session import Session
from agent.workers.programs import WorkerGateway
from agent.workers.wire import Answer, Kind, Setup, Taken, Work, decode_work, started
from conversations.errors import ConversationsError, RecordError
from conversations.trajectory import Trajectory
from tools.base import ToolsError

T = TypeVar("T")

TAKE_S = 1.0
"""How long `take` waits for an answer before it reports progress only."""
TAKE_BYTES = 8 << 20
"""An answer that passes this size is the last of its `take`."""


class Worker:
    """What Ray runs. Its methods are called by `pool.py` alone."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._programs: WorkerGateway | None = None
        self._desk = Desk()

    async def place(self) -> tuple[str, int]:
        """Host name and process id: answered as soon as the worker has a place."""
        return socket.gethostname(), os.getpid()

    async def start(self, setup: Setup) -> bytes:
        """Starts tools and engine; seconds to minutes.

        Answers {"engine", "served"}, or {"error"}: one line.
        """
        try:
            session, programs = await asyncio.to_thread(_start, setup)
        except (AgentError, ConversationsError, ToolsError) as error:
            return started(error=str(error))
        except ModuleNotFoundError as error:  # its machine may lack what the run's has
            return started(error=not_installed(error) or describe(error))
        except Exception as error:
            return started(error=describe(error))
        self._session, self._programs = session, programs
        self._desk.runtime, self._desk.programs = session.runtime, programs
        engine = session.engine
        served = getattr(engine, "served", None)
        return started(engine=engine.describe(), served=served() if served else None)

    async def begin(self, works: Sequence[tuple[int, bytes]]) -> None:
        """Begins conversations: the number of each, and its `encode_work`."""
        await self._on_loop(self._desk.begin(works))

    async def cut(self, numbers: Sequence[int]) -> None:
        """Cuts conversations off. Each is answered with its record, as any other."""
        await self._on_loop(self._desk.cut(numbers))

    async def take(self) -> Taken:
        """What has finished; waits `TAKE_S` at most."""
        return await self._on_loop(self._desk.take())

    async def close(self) -> None:
        """Ends programs, tools and engine."""
        if self._programs:
            await asyncio.to_thread(self._programs.close)
        if self._session:
            await asyncio.to_thread(self._session.close)

    async def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._session is not None
        return await self._session.arun(coroutine)


def _start(setup: Setup) -> tuple[Session, WorkerGateway | None]:
    os.environ.update(setup.variables)
    if setup.working_folder.is_dir():
        os.chdir(setup.working_folder)
    sys.path += [folder for folder in setup.folders if folder not in sys.path]
    config = setup.config
    if setup.programs:
        parts = prepare(config)  # programs have tools of their own
    else:
        parts = prepare(config, config_tools(config), config_interactions(config))
    log = None
    if setup.log_folder and setup.log_folder.is_dir():
        log = setup.log_folder / f"engine-{setup.index}.log"
    session = Session(
        parts, validate=setup.validate, start=functools.partial(setup.start, config, log)
    )
    programs = None
    try:
        if setup.programs:
            programs = WorkerGateway(session, setup.programs)
            programs.start()
    except BaseException:
        session.close()
        raise
    settle_collector()
    return session, programs


@dataclass(slots=True)
class Desk:
    """The conversations of a worker, or its programs' sessions. Everything here happens on the
    session's loop.
    """

    runtime: Runtime | None = None
    programs: WorkerGateway | None = None
    _running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    _live: dict[int, Conversation] = field(default_factory=dict)
    _answers: list[Answer] = field(default_factory=list)
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def begin(self, works: Sequence[tuple[int, bytes]]) -> None:
        for number, data in works:
            self._running[number] = asyncio.create_task(self._run(number, data))

    async def cut(self, numbers: Sequence[int]) -> None:
        await asyncio.sleep(0)  # what was begun just now runs first: a task must start to answer
        for number in numbers:
            if running := self._running.get(number):
                running.cancel()

    async def take(self) -> Taken:
        if not self._answers:
            try:
                async with asyncio.timeout(TAKE_S):
                    await self._answered.wait()
            except TimeoutError:
                pass
        answers, size = 0, 0
        while answers < len(self._answers) and size < TAKE_BYTES:
            _, _, line, evidence, images, files = self._answers[answers]
            size += len(line) + len(evidence or b"") + sum(map(len, images))
            size += sum(len(content) for _, content in files)
            answers += 1
        taken, self._answers = self._answers[:answers], self._answers[answers:]
        if not self._answers:
            self._answered.clear()
        return self._counted(taken)

    def _counted(self, answers: list[Answer]) -> Taken:
        assert self.runtime is not None
        live: Collection[Any] = self.programs.live if self.programs else self._live.values()
        in_flight = getattr(self.runtime.engine, "tokens_in_flight", None)
        return Taken(
            answers,
            turns=sum(len(conversation.turns) for conversation in live),
            tokens=sum(sampled_tokens(conversation.turns) for conversation in live),
            tokens_in_flight=in_flight() if in_flight else 0,
        )

    async def _run(self, number: int, data: bytes) -> None:
        kind, text, more = Kind.BROKEN, "", _Beside()
        try:
            run = self._run_program if self.programs else self._converse
            kind, text, more = await run(number, decode_work(data))
        except RecordError as error:
            kind, text = Kind.LOST, str(error)
        except AgentError as error:
            kind, text = Kind.REFUSED, str(error)
        except Exception as error:
            text = describe(error)
        finally:
            del self._running[number]
            line = text.encode(errors="replace")
            answer = (number, str(kind), line, more.evidence, more.images, more.files)
            self._answers.append(answer)
            self._answered.set()

    async def _converse(self, number: int, work: Work) -> tuple[Kind, str, _Beside]:
        """Runs the conversation: what came of it, its record's line, and what lies beside it."""
        assert self.runtime is not None
        conversation = continued(work.task, work.sample, work.before, self.runtime)
        self._live[number] = conversation
        kind = Kind.RECORD
        try:
            await converse_observed(conversation)
        except asyncio.CancelledError:  # by `cut`
            kind = Kind.CUT
        finally:
            del self._live[number]
        line = _line(trajectory_of(conversation))
        return kind, line, _Beside(evidence_file(conversation), image_files(conversation))

    async def _run_program(self, number: int, work: Work) -> tuple[Kind, str, _Beside]:
        """`_converse` for an agent program."""
        assert self.programs is not None
        assert self.runtime is not None
        kind = Kind.RECORD
        try:
            await self.programs.run_program(work.task, work.sample)
        except asyncio.CancelledError:  # by `cut`
            kind = Kind.CUT
        taking = asyncio.ensure_future(
            asyncio.to_thread(self.programs.take, work.task, work.sample)
        )
        try:
            await asyncio.wait((taking,))
        except asyncio.CancelledError:  # too late: it has its record
            await asyncio.wait((taking,))
        line, files = taking.result()
        if line is None:
            nothing = Counterparts(None, None)
            begun = Conversation(work.task, work.sample, self.runtime, nothing)
            line = _line(trajectory_of(begun))
        return kind, line, _Beside(files=files)


@dataclass(frozen=True, slots=True)
class _Beside:
    """What lies beside a record: the content of its evidence, its images, a program's files."""

    evidence: bytes | None = None
    images: tuple[bytes, ...] = ()
    files: SentFiles = ()


def _line(record: Trajectory) -> str:
    """The record's line, or that of what has a JSON form. Raises RecordError if neither has one."""
    try:
        return record.to_line()
    except RecordError as error:
        return bare_record(record, str(error)).to_line()
