"""A gateway with its engine and its run folder: started, used from Python, stopped.

    async with Gateway(load_config("config.yaml"), "runs/x") as gateway:
        async with gateway.session("task-1") as session:
            program = await asyncio.create_subprocess_exec("my-agent", env=session.env())
            await program.wait()
            await session.finish(reward=1.0)

The sessions are the same that the HTTP routes open. Everything runs on the engine's event loop;
callers may be on any other.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from agent.config.config import Config
from agent.engines.engine import Engine
from agent.errors import AgentError
from agent.gateway.request import Refusal
from agent.gateway.server import LOOPBACK, Access, GatewayServer
from agent.gateway.session import GatewaySession
from agent.gateway.sessions import GatewaySessions, Score, SessionOutcome
from agent.gateway.sessions_api import ending_reason, reward_parts
from agent.loop.batch import Progress
from agent.loop.boundary import describe
from agent.loop.tasks import Task
from agent.runs.manifest import processor_entry, run_manifest, save_tokenizer
from agent.runs.parts import prepare
from agent.runs.progress import counts
from agent.runs.session import Session
from conversations.run.store import RUN, TRAJECTORIES, RunFolder, read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory

T = TypeVar("T")

TURN_LIMIT = "rollout.multi_turn.max_assistant_turns"
"""The key as a user gives it."""

FOREIGN_KEY = "ANTHROPIC_AUTH_TOKEN"
"""A user's key, which Anthropic's clients would send before the session's."""


def gateway_config(config: Config) -> Config:
    """The config as a gateway takes it; it may have been taken before.

    A program's first prompt may be as long as the model allows, and the program decides about
    turns: the embedded config's limit on them is for conversations of our own.
    """
    length, rollout = config.max_model_len, config.rollout
    turns: dict[str, Any] = {"enable": True}
    if config.path is None and TURN_LIMIT not in config.given:
        turns["max_assistant_turns"] = None
    update = {
        "prompt_length": length,
        "response_length": rollout.turntrace.session_length or rollout.response_length,
        "max_model_len": length,
        "multi_turn": rollout.multi_turn.model_copy(update=turns),
    }
    return replace(config, rollout=rollout.model_copy(update=update))


def gateway_manifest(
    config: Config,
    tasks: Path | None,
    *,
    limit: int | None = None,
    validate: bool = False,
    argv: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """run.json of a gateway's run; `config` is from `gateway_config`, `more` are further fields."""
    manifest = run_manifest(config, tasks, limit=limit, validate=validate, argv=argv)
    manifest |= {"gateway": True, **(more or {})}
    if tasks is None:  # programs open as many samples as they like
        manifest["n"] = None
    return manifest


class Gateway:
    """An endpoint over the config's engine that records into `out`.

    Start it with `start` or `async with`; `url` says where it listens. It listens on loopback
    unless `host` says otherwise; elsewhere `admin_key` is needed. `open_to_all`: an unknown API key
    makes a session of its own. `resume` goes on with a run whose gateway was stopped or killed.
    `tasks` is the file whose rows the sessions are for: then sessions that did not end begin anew.
    `validate` samples with val_kwargs, `more` are further fields of run.json. `engine` makes
    another engine than the config's, `template` takes the place of the model's.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin_key: str | None = None,
        open_to_all: bool = False,
        resume: bool = False,
        force: bool = False,
        tasks: Path | None = None,
        limit: int | None = None,
        validate: bool = False,
        more: Mapping[str, Any] | None = None,
        argv: Sequence[str] = (),
        progress: Progress | None = None,
        engine: Callable[[], Engine] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        if host not in LOOPBACK and not admin_key:
            raise AgentError(
                f"--host {host}: a gateway that others can reach needs a key for its sessions; "
                "give --admin-key or TURNTRACE_ADMIN_KEY"
            )
        self.config = gateway_config(config)
        self.out = Path(out)
        self.progress = progress or Progress()
        self.restored = 0
        self.socket: Path | None = None
        self._host, self._port = host, port
        self._access = Access(admin_key, needs_key=host not in LOOPBACK)
        self._open_to_all = open_to_all
        self._resume, self._force = resume, force
        self._tasks, self._limit, self._argv = tasks, limit, argv
        self._validate, self._more = validate, dict(more or {})
        self._engine, self._template = engine, template
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """`http://HOST:PORT`."""
        return self.server.url

    # ------------------------------------------------------------------ its life

    def start(self) -> None:
        """Opens the run folder, starts the engine and listens. Blocks until all is up.

        Raises the packages' one-line errors; then nothing is left running.
        """
        self._check_address()
        with ExitStack() as stack:
            self.folder = self._open_folder()
            stack.callback(self._close_folder)
            try:
                parts = prepare(self.config, template=self._template)
                save_tokenizer(self.out, parts.template.tokenizer)
                self.folder.note("call_format", parts.template.format_entry())
                if parts.images:
                    self.folder.note("image_processor", processor_entry(parts.template))
                log = self.out / "engine.log"
                self.session_loop = stack.enter_context(
                    Session(parts, validate=self._validate, log_path=log, start=self._engine)
                )
                runtime = self.session_loop.runtime
                self.sessions = GatewaySessions(
                    runtime, self.folder, self.progress, open_to_all=self._open_to_all
                )
                if self._resume:
                    self._count_earlier()
                    self.restored = self.sessions.restore(self.folder, anew=self._tasks is not None)
                name = Path(self.config.model_path).name
                self.server = GatewayServer(self.sessions, name, self._access)
                self._listen()
            except BaseException:
                self.folder.close()
                if not self._resume:  # a new folder holds no run
                    (self.out / RUN).unlink(missing_ok=True)
                raise
            stack.callback(lambda: self.session_loop.run(self._stop()))
            self._stack = stack.pop_all()

    def listen_on_socket(self) -> Path:
        """A unix socket on which the gateway listens too, for programs without a network."""
        if self.socket is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="turntrace-"))
            os.chmod(folder, 0o711)  # isolated programs are another user
            self.socket = Path(folder) / "gateway.sock"
            self.session_loop.run(self.server.listen_on(str(self.socket)))
            os.chmod(self.socket, 0o666)  # who may ask is told by keys
        return self.socket

    def _open_folder(self) -> RunFolder:
        manifest = gateway_manifest(
            self.config,
            self._tasks,
            limit=self._limit,
            validate=self._validate,
            argv=self._argv,
            more=self._more,
        )
        if self._resume:
            return RunFolder.resume(self.out, manifest, force=self._force)
        return RunFolder.create(self.out, manifest)

    def _count_earlier(self) -> None:
        """Counts the records that the run has already."""
        if (self.out / TRAJECTORIES).exists():
            for trajectory in read_trajectories(self.out):
                self.progress.count(trajectory)

    def _check_address(self) -> None:
        """Raises AgentError if the address cannot be listened on: an engine may start for long."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            socket.create_server((self._host, self._port), family=family).close()
        except OSError as error:
            raise self._cannot_listen(error) from error

    def _listen(self) -> None:
        try:
            self.session_loop.run(self.server.start(self._host, self._port))
        except OSError as error:
            raise self._cannot_listen(error) from error

    def _cannot_listen(self, error: OSError) -> AgentError:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        return AgentError(
            f"cannot listen on {self._host}:{self._port}: {reason}; choose another --port or --host"
        )

    async def _stop(self) -> None:
        if self.progress.total is None:
            self.progress.total = self.progress.done + len(self.sessions.live)
        try:
            await self.sessions.close()
        finally:
            await self.server.stop()

    def _close_folder(self) -> None:
        self.folder.close(counts(self.progress))

    def close(self) -> None:
        """Stops serving; sessions that did not end are kept for a resume. Safe to call twice."""
        self._stack.close()

    async def __aenter__(self) -> Gateway:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ sessions

    @asynccontextmanager
    async def session(
        self, task: Task | Mapping[str, Any] | str | None = None, sample: int = 0
    ) -> AsyncIterator[ProgramSession]:
        """A session for a task: a `Task`, its id, or {task_id, ground_truth, data_source, extra}.

        At the end of the block it is finished, if `finish` was not called: with `infra_error` after
        an exception. A cancelled one is kept as unfinished. Raises AgentError if the (task, sample)
        has a session already.
        """
        handle = await self.open(task, sample)
        try:
            yield handle
        except asyncio.CancelledError:
            await handle.abort()
            raise
        except BaseException as error:
            await handle.finish(infra_error=True, error=describe(error))
            raise
        await handle.finish()

    async def open(
        self, task: Task | Mapping[str, Any] | str | None = None, sample: int = 0
    ) -> ProgramSession:
        """A new session, which its caller has to finish. Raises AgentError."""
        opened = self.session_loop.arun(self._opened(_task(task), sample))
        return await _told(opened)

    async def _opened(self, task: Task, sample: int) -> ProgramSession:
        session, key = self.sessions.open(task, sample)
        return ProgramSession(self, session, key)


class ProgramSession:
    """A session as the code that runs its program sees it."""

    def __init__(self, gateway: Gateway, session: GatewaySession, api_key: str) -> None:
        self._gateway = gateway
        self._session = session
        self.id = session.name
        self.api_key = api_key
        self.record: Trajectory | None = None

    @property
    def has_turns(self) -> bool:
        """Whether the program got a turn."""
        return bool(self._session.turns)

    @property
    def openai_base_url(self) -> str:
        """For clients of chat completions and of responses."""
        return f"{self._gateway.url}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """For clients of Anthropic's messages."""
        return self._gateway.url

    def env(self, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a program: `inherited` (this process's), with endpoint and key."""
        given = os.environ if inherited is None else inherited
        return {
            **{name: value for name, value in given.items() if name != FOREIGN_KEY},
            "OPENAI_BASE_URL": self.openai_base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
        }

    async def finish(
        self,
        reward: float | None = None,
        *,
        reward_parts: Mapping[str, float] | None = None,
        stop_reason: str = "stop",
        infra_error: bool = False,
        error: str | None = None,
        extra: Any = None,
        score: Score | None = None,
    ) -> Trajectory:
        """Ends the session and returns its record; a second call returns the first one's.

        `score` gives the parts of the reward, called with the record without one. Raises AgentError
        if a reward is no finite number, the stop reason no end, or the record cannot be written.
        """
        if self.record is None:
            parts = _reward_parts(reward, reward_parts)
            reason = _ending_reason(stop_reason)
            outcome = SessionOutcome(parts, reason, infra_error, error, extra, score)
            finishing = self._gateway.sessions.finish(self._session, outcome)
            finished = await _told(self._gateway.session_loop.arun(finishing))
            self.record = finished.record
        return self.record

    async def abort(self) -> None:
        """Gives the session up: what there is of it goes to unfinished.jsonl."""
        if self.record is None:
            aborted = self._gateway.sessions.abort(self._session)
            await self._gateway.session_loop.arun(aborted)


def _reward_parts(reward: Any, parts: Mapping[str, Any] | None) -> dict[str, float]:
    try:
        return reward_parts(reward, parts)
    except Refusal as refusal:
        raise AgentError(refusal.message) from refusal


def _ending_reason(reason: str) -> str:
    try:
        return ending_reason(reason)
    except Refusal as refusal:
        raise AgentError(refusal.message) from refusal


async def _told(work: Awaitable[T]) -> T:
    """The result; a refusal is an AgentError to callers in Python."""
    try:
        return await work
    except Refusal as refusal:
        raise AgentError(refusal.message) from refusal


def _task(given: Task | Mapping[str, Any] | str | None) -> Task:
    if isinstance(given, Task):
        return given
    fields = {"task_id": given} if isinstance(given, str) else dict(given or {})
    task_id = fields.pop("task_id", None) or f"session-{secrets.token_hex(6)}"
    unknown = fields.keys() - {"ground_truth", "data_source", "extra"}
    if unknown:
        raise AgentError(
            f"a session's task has the fields task_id, ground_truth, data_source and extra, not "
            f"{', '.join(sorted(unknown))}"
        )
    return Task(str(task_id), [], **fields)
