"""A trajectory's Python session on a sandbox server, from its first call to its release.

The model reads that its variables are gone: at the end of the call that ended the session, or at
the start of the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import httpx
import pydantic

from tools.backend import Backend
from tools.base import BackendError, ToolConfigError
from tools.reading import first_problem
from tools.servers.sandbox.wire import RunCodeRequest, SessionCode, SessionRequest, SessionResponse

_PATH = "v1/sessions"
_END_S = 5.0

OVER = "The session has ended: its variables are gone, and the next call starts a new one."
LOST = "The session of the earlier calls has ended and its variables are gone; this is a new one."


@dataclass(slots=True)
class _TrajectorySession:
    """One trajectory's session.

    path: of the session on the server, if there is one
    is_lost: there was one, and the model does not know yet that it ended
    """

    path: str | None = None
    is_lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class TrajectorySessions:
    """The sessions of all trajectories. `memory_mib` is the limit of each."""

    def __init__(self, backend: Backend, memory_mib: int) -> None:
        self._backend = backend
        self._memory_mib = memory_mib
        self._sessions: dict[str, _TrajectorySession] = {}

    async def check(self) -> None:
        """Raises ToolConfigError if the server has no sessions or cannot be asked."""
        try:
            answer = await self._backend.send("GET", path="v1/info")
            keeps = answer.is_success and answer.json().get("sessions") is True
        except BackendError as error:
            raise ToolConfigError(f"config.session: {error}") from error
        except (ValueError, AttributeError):
            keeps = False
        if not keeps:
            raise ToolConfigError(
                f"config.session: the server at {answer.url.copy_with(path='/', query=None)} "
                "keeps no sessions; use one of `turntrace serve sandbox`, or leave session out"
            )

    async def run(
        self, instance_id: str, request: RunCodeRequest
    ) -> tuple[SessionResponse, tuple[str, str]]:
        """The result, and notes for the model before and after it. Raises BackendError."""
        session = self._sessions.setdefault(instance_id, _TrajectorySession())
        async with session.lock:
            try:
                response = await self._run(session, request)
            except BaseException:  # the session may have died with the call: a new one is safer
                await self._drop(session)
                raise
            before = LOST if session.is_lost else ""
            after = OVER if response.session_ended else ""
            session.is_lost = response.status == "SandboxError"
            if response.session_ended:
                session.path = None
            return response, (before, after)

    async def _run(self, session: _TrajectorySession, request: RunCodeRequest) -> SessionResponse:
        body = (
            SessionCode(code=request.code, stdin=request.stdin, run_timeout=request.run_timeout)
            .model_dump_json()
            .encode()
        )
        if session.path is not None:
            answer = await self._backend.send("POST", body, f"{session.path}/run_code")
            if answer.status_code != httpx.codes.NOT_FOUND:
                return self._parsed(answer)
            session.path, session.is_lost = None, True
        session.path = await self._start()
        return self._parsed(await self._backend.send("POST", body, f"{session.path}/run_code"))

    async def _start(self) -> str:
        body = SessionRequest(memory_limit_MB=self._memory_mib).model_dump_json().encode()
        answer = self._backend.succeeded(await self._backend.send("POST", body, _PATH))
        try:
            return f"{_PATH}/{answer.json()['id']}"
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"the sandbox did not answer with a session's id: {answer.text[:200]}"
            ) from error

    def _parsed(self, answer: httpx.Response) -> SessionResponse:
        try:
            return SessionResponse.model_validate_json(self._backend.succeeded(answer).content)
        except pydantic.ValidationError as error:
            problem = first_problem(error, SessionResponse)
            raise BackendError(f"the sandbox sent an invalid answer: {problem}") from error

    async def end(self, instance_id: str) -> None:
        """Ends a trajectory's session, if it has one; if the server is gone, so is the session."""
        if session := self._sessions.pop(instance_id, None):
            await self._drop(session)

    async def close(self) -> None:
        """Ends all sessions."""
        for instance_id in list(self._sessions):
            await self.end(instance_id)

    async def _drop(self, session: _TrajectorySession) -> None:
        path, session.path = session.path, None
        if path is not None:
            session.is_lost = True
            with contextlib.suppress(BackendError, TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._backend.send("DELETE", path=path)
