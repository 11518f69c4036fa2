"""A trajectory's Python session on a sandbox server: started with its first call, ended with its release.

The model is told when what it knew is gone: at the end of the call that ended the session, or at the start of the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import httpx
import pydantic

from tools.backend import Backend
from tools.base import BackendError, ToolConfigError
from tools.servers.sandbox.wire import RunCodeRequest, SessionCode, SessionRequest, SessionResponse

_PATH = "v1/sessions"
_END_S = 5.0

OVER = "The session has ended: its variables are gone, and the next call starts a new one."
LOST = "The session of the earlier calls has ended and its variables are gone; this is a new one."


@dataclass(slots=True)
class _Held:
    """One trajectory's. `path` is its session's on the server, if it has one; `is_lost`: it had, and was not told."""

    path: str | None = None
    is_lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """By trajectory. `memory_mib` is each session's limit."""

    def __init__(self, backend: Backend, memory_mib: int) -> None:
        self._backend = backend
        self._memory_mib = memory_mib
        self._held: dict[str, _Held] = {}

    async def check(self) -> None:
        """Raises ToolConfigError where the server keeps no sessions, or cannot be asked."""
        try:
            answer = await self._backend.send("GET", path="v1/info")
            keeps = answer.is_success and answer.json().get("sessions") is True
        except BackendError as error:
            raise ToolConfigError(f"config.session: {error}") from error
        except (ValueError, AttributeError):
            keeps = False
        if not keeps:
            raise ToolConfigError(
                f"config.session: the server at {answer.url.copy_with(path='/', query=None)} keeps no sessions; "
                "take one that `turntrace serve sandbox` starts, or leave session out"
            )

    async def run(
        self, instance_id: str, request: RunCodeRequest
    ) -> tuple[SessionResponse, tuple[str, str]]:
        """How the call went, and what to tell the model before and after it. Raises BackendError."""
        held = self._held.setdefault(instance_id, _Held())
        async with held.lock:
            try:
                response = await self._run(held, request)
            except BaseException:  # Whatever became of the call, a session that may have died with it is not gone on with.
                await self._drop(held)
                raise
            before, held.is_lost = LOST if held.is_lost else "", response.status == "SandboxError"
            if response.session_ended:
                held.path = None
            return response, (before, OVER if response.session_ended else "")

    async def _run(self, held: _Held, request: RunCodeRequest) -> SessionResponse:
        asked = (
            SessionCode(code=request.code, stdin=request.stdin, run_timeout=request.run_timeout)
            .model_dump_json()
            .encode()
        )
        if held.path is not None:
            answer = await self._backend.send("POST", asked, f"{held.path}/run_code")
            if answer.status_code != httpx.codes.NOT_FOUND:
                return self._parsed(answer)
            held.path, held.is_lost = None, True
        held.path = await self._start()
        return self._parsed(await self._backend.send("POST", asked, f"{held.path}/run_code"))

    async def _start(self) -> str:
        asked = SessionRequest(memory_limit_MB=self._memory_mib).model_dump_json().encode()
        answer = self._backend.succeeded(await self._backend.send("POST", asked, _PATH))
        try:
            return f"{_PATH}/{answer.json()['id']}"
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"the sandbox answered nonsense to the start of a session: {answer.text[:200]}"
            ) from error

    def _parsed(self, answer: httpx.Response) -> SessionResponse:
        try:
            return SessionResponse.model_validate_json(self._backend.succeeded(answer).content)
        except pydantic.ValidationError as error:
            raise BackendError(f"the sandbox answered nonsense: {error}") from error

    async def end(self, instance_id: str) -> None:
        """Ends a trajectory's session, if it has one; a server that is gone has ended it already."""
        if held := self._held.pop(instance_id, None):
            await self._drop(held)

    async def close(self) -> None:
        """Ends them all."""
        for instance_id in list(self._held):
            await self.end(instance_id)

    async def _drop(self, held: _Held) -> None:
        path, held.path = held.path, None
        if path is not None:
            held.is_lost = True
            with contextlib.suppress(BackendError, TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._backend.send("DELETE", path=path)
