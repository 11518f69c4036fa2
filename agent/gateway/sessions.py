"""The sessions of a gateway: who may use which, and how each one begins and ends.

Invariants: each (task, sample) is one session at a time and ends on one line of the run. Keys are
kept as hashes alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from agent.errors import AgentError
from agent.gateway.journal import JournaledSession, line_of, read_journal, turn_line
from agent.gateway.record import trajectory_of_session
from agent.gateway.request import Refusal
from agent.gateway.session import RETRY_AFTER_S, GatewaySession
from agent.loop.batch import Progress
from agent.loop.boundary import describe
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from conversations.errors import RecordError, RunFolderError
from conversations.run.hash_store import HashStore
from conversations.run.store import RunFolder
from conversations.session import SessionTurn
from conversations.trajectory import Trajectory

Score = Callable[[Trajectory], Mapping[str, float]]
"""The parts of a reward, from a record without one."""


@dataclass(frozen=True, slots=True)
class SessionOutcome:
    """How a program says that its session ended. `stop_reason` counts if nothing ended it before.

    `reward_parts` are numbers; the reward is their sum. `score` gives them instead, called in a
    thread. `error` belongs to an `infra_error`.
    """

    reward_parts: Mapping[str, float] = field(default_factory=dict)
    stop_reason: str = "stop"
    infra_error: bool = False
    error: str | None = None
    extra: Any = None
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class FinishedSession:
    """The record of a session, and its line in the run."""

    record: Trajectory
    line: str


class RecordStore(Protocol):
    """Where sessions' lines go: a run folder, or what a worker sends to one.

    `done` holds the (task, sample) pairs that have a record.
    """

    done: set[tuple[str, int]]

    def append(self, trajectory: Trajectory) -> str:
        """Keeps a finished record; returns its line. Raises RecordError, RunFolderError."""

    def append_unfinished(self, trajectory: Trajectory) -> object:
        """Keeps the record of a session that did not end."""

    def append_journal(self, line: bytes) -> None:
        """Keeps a line of turns.jsonl."""

    def image_store(self) -> HashStore:
        """Where images are kept."""


class GatewaySessions:
    """The sessions of one run. `open_to_all`: an unknown key makes a session of its own."""

    def __init__(
        self,
        runtime: Runtime,
        folder: RecordStore,
        progress: Progress | None = None,
        *,
        open_to_all: bool = False,
    ) -> None:
        self.runtime = runtime
        self.folder = folder
        self.progress = progress or Progress()
        self.open_to_all = open_to_all
        if runtime.images:
            runtime.images.look_in(folder.image_store())
        self.reasons: Counter[str] = Counter()
        self._by_name: dict[str, GatewaySession] = {}
        self._by_key: dict[str, GatewaySession] = {}
        self._ended_keys: set[str] = set()
        self._ended_names: set[str] = set()

    @property
    def live(self) -> list[GatewaySession]:
        """The sessions that did not end."""
        return list(self._by_name.values())

    def is_sampling(self) -> bool:
        """Whether a turn is being sampled."""
        return any(session.answering for session in self._by_name.values())

    # ------------------------------------------------------------------ beginning

    def open(
        self, task: Task, sample: int = 0, *, key: str | None = None
    ) -> tuple[GatewaySession, str]:
        """A new session and its API key. Raises Refusal if its (task, sample) was begun before."""
        if (task.id, sample) in self.folder.done or any(
            (one.task.id, one.sample) == (task.id, sample) for one in self._by_name.values()
        ):
            raise Refusal(
                f"task_id: {task.id!r} with sample {sample} has a session already",
                status=409,
                code="session_exists",
                field="task_id",
            )
        key = key or f"tt-{secrets.token_hex(16)}"
        session = self._new(secrets.token_hex(8), task, sample)
        digest = _digest(key)
        fields = {
            "key": digest,
            "task_id": task.id,
            "sample": sample,
            "messages": task.messages,
            "ground_truth": task.ground_truth,
            "data_source": task.data_source,
            "extra": task.extra,
            "started_at": session.clock.started_at,
        }
        try:
            self.folder.append_journal(line_of("session", session.name, **fields))
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(f"the task has no JSON form: {error}", code="invalid_task") from error
        self._register(session, digest)
        return session, key

    def _new(self, name: str, task: Task, sample: int) -> GatewaySession:
        return GatewaySession(name, task, sample, self.runtime, self._write_turn, self._keep_images)

    def _keep_images(self, images: Sequence[bytes]) -> None:
        store = self.folder.image_store()
        for png in images:
            store.put(png)

    def _register(self, session: GatewaySession, digest: str) -> None:
        self._by_name[session.name] = session
        self._by_key[digest] = session
        self.progress.live.add(session)  # type: ignore[arg-type]

    def _write_turn(self, session: GatewaySession, turn: SessionTurn) -> None:
        entry = session.tree.entry(turn)
        at_s = round(session.clock.so_far_s, 3)
        self.folder.append_journal(turn_line(session.name, at_s, entry))
        if turn.reason:
            self.reasons[turn.reason] += 1

    # ------------------------------------------------------------------ who asks

    def of_key(self, key: str | None) -> GatewaySession | None:
        """The session of an API key; None if the key is not known.

        Raises Refusal if its session has ended.
        """
        if not key:
            return None
        digest = _digest(key)
        if digest in self._ended_keys:
            raise _ended()
        session = self._by_key.get(digest)
        if session is None and self.open_to_all:
            return self._own_session(key, digest)
        return session

    def _own_session(self, key: str, digest: str) -> GatewaySession:
        return self.open(Task(f"key-{digest[:16]}", []), key=key)[0]

    def named(self, name: str) -> GatewaySession:
        """The session of this name. Raises Refusal."""
        if name in self._ended_names:
            raise _ended()
        if name not in self._by_name:
            raise Refusal(f"there is no session {name!r}", status=404, code="not_found")
        return self._by_name[name]

    # ------------------------------------------------------------------ ending

    async def finish(self, session: GatewaySession, outcome: SessionOutcome) -> FinishedSession:
        """Ends a session and writes its record, which is returned. Raises Refusal.

        Where the engine had failed last, the reward is unknown, never 0.
        """
        await self._close(session)
        if self._by_name.get(session.name) is not session:  # somebody was faster
            raise _ended()
        if session.engine_trouble:
            session.ending.fail(session.engine_trouble, "engine_error")
        before = replace(session.ending)
        session.ending.stop(outcome.stop_reason)
        if outcome.infra_error or outcome.stop_reason == "engine_error":
            session.ending.fail(outcome.error or "the program reported a failure")
        session.reward_parts = dict(outcome.reward_parts)
        session.said_at_end = outcome.extra
        if outcome.score and not session.ending.is_failure:
            try:
                await self._score(session, outcome.score)
            except asyncio.CancelledError:  # it has not ended yet
                session.ending = before
                raise
        trajectory = trajectory_of_session(session)
        try:
            line = self.folder.append(trajectory)
        except RecordError as error:
            session.ending = before  # it has not ended yet, and may still be kept as unfinished
            session.reward_parts, session.said_at_end = {}, None
            raise Refusal(f"the record has no JSON form: {error}", code="invalid_record") from error
        with contextlib.suppress(RunFolderError):  # a resume sees the record itself
            self._forget(session)
        self.progress.count(trajectory)
        return FinishedSession(trajectory, line)

    async def _score(self, session: GatewaySession, score: Score) -> None:
        """Sets the reward. One that cannot be had is unknown, never 0."""
        record = trajectory_of_session(session)
        try:
            session.reward_parts = dict(await asyncio.to_thread(_scored, score, record))
        except Exception as error:
            session.ending.fail(f"the reward function failed: {describe(error)}")

    async def abort(self, session: GatewaySession) -> None:
        """Gives a session up: what there is of it goes to unfinished.jsonl, if it did not end."""
        await self._close(session)
        if self._by_name.get(session.name) is not session:
            return
        self.folder.append_unfinished(trajectory_of_session(session))
        self._forget(session)

    async def _close(self, session: GatewaySession, why: Refusal | None = None) -> None:
        await session.close(why or _ended())
        self.progress.live.discard(session)  # type: ignore[arg-type,unused-ignore]

    def _forget(self, session: GatewaySession) -> None:
        self._by_name.pop(session.name, None)
        for digest in [key for key, one in self._by_key.items() if one is session]:
            del self._by_key[digest]
            self._ended_keys.add(digest)
        session.tree.break_cycles()
        self._ended_names.add(session.name)
        self.folder.append_journal(line_of("end", session.name))

    async def close(self) -> None:
        """Keeps the sessions that did not end as unfinished; a resume goes on with them.

        One that cannot be kept does not keep the others out; its error is raised at the end.
        """
        why = Refusal(
            "the gateway is stopping", status=503, code="stopping", retry_after_s=RETRY_AFTER_S
        )
        failures: list[Exception] = []
        for session in self.live:
            try:
                await self._close(session, why)
                self.folder.append_unfinished(trajectory_of_session(session))
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    # ------------------------------------------------------------------ after a kill

    def restore(self, folder: RunFolder, *, anew: bool = False) -> int:
        """Brings back the sessions of the folder's journal that did not end; returns how many.

        None with `anew`: their programs are gone, and begin again. Raises AgentError if a turn of
        it does not fit: another template, or a damaged line.
        """
        journaled = [
            one
            for one in read_journal(folder.path)
            if not anew and (one.opened["task_id"], one.opened["sample"]) not in folder.done
        ]
        for one in journaled:
            self._restore(one)
        folder.keep_journal(line for one in journaled for line in one.lines)
        return len(journaled)

    def _restore(self, journaled: JournaledSession) -> None:
        opened = journaled.opened
        task = Task(
            opened["task_id"],
            opened["messages"],
            ground_truth=opened["ground_truth"],
            data_source=opened["data_source"],
            extra=opened["extra"],
        )
        session = self._new(opened["name"], task, opened["sample"])
        session.clock.started_at = opened["started_at"]
        try:
            for event in journaled.turns:
                session.restore(event["entry"])
                session.clock.earlier_s = event["at_s"]
        except Exception as error:
            raise AgentError(
                f"session {session.name} ({task.id}) cannot be brought back: {error}"
            ) from error
        self._register(session, opened["key"])


def _scored(score: Score, record: Trajectory) -> Mapping[str, float]:
    """The parts of the reward. No thread but the main one gets Ctrl-C, so neither exit is ours."""
    try:
        return score(record)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"it raised {describe(error)}") from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _ended() -> Refusal:
    return Refusal("this session is finished", code="session_finished")
