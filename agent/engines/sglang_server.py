"""Running SGLang servers as one engine: sticky routing, retries, fail-over.

Invariants: `/generate` is called for a conversation's turns only. A conversation stays with one server while that is
up, where its prefix is cached. A turn is sent again only when its answer can no longer come (no connection, one that
broke, a 5xx), each time under a request id of its own, the one before aborted; since a conversation owns its tokens it
goes on from its last turn, on any server. A cancelled turn is aborted on its server. Answers are checked as those of
the in-process engine are.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from typing import Any

import httpx

from agent.engines.engine import Generation, SamplingParams
from agent.engines.server import Server, ServerFailedError, ServerLostError, reason
from agent.engines.sglang import check_sampling, interruption, read_answer
from agent.errors import ConfigError, EngineError, EngineStartError

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0


class SGLangServerEngine:
    """The servers at `urls`. `max_connections`, of each, should be the number of conversations that run at once.

    A turn may take `read_timeout_s` and is sent `attempts` times at most; while no server is up it waits, `wait_s` at
    most, which is what a restart may take. Raises ConfigError for an address that is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        *,
        max_connections: int = 1000,
        read_timeout_s: float = 3600.0,
        attempts: int = 8,
        wait_s: float = 300.0,
    ) -> None:
        if not urls or len({url.rstrip("/") for url in urls}) < len(urls):
            raise ConfigError(f"rollout.server.urls must name one server or several different ones, got {len(urls)}")
        self._servers = [
            Server(url, api_key, max_connections=max_connections, read_timeout_s=read_timeout_s, changed=self._note_change) for url in urls
        ]
        self._attempts = attempts
        self._wait_s = wait_s
        self._any_up = asyncio.Event()
        self._any_up.set()
        self._requests: dict[str, tuple[Server, str]] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Checks that every server is up and that all serve the same model. Raises EngineStartError."""
        await asyncio.gather(*(self._connect(server) for server in self._servers))
        models = {str(server.info.get("model_path")): server.url for server in self._servers}
        if len(models) > 1:
            served = ", ".join(f"{url} {model}" for model, url in models.items())
            raise EngineStartError(f"the servers of rollout.server.urls serve different models: {served}")

    async def _connect(self, server: Server) -> None:
        try:
            server.info = await server.ready()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineStartError(f"no SGLang server is ready at {server.url}: {reason(error)}; check rollout.server.urls") from error

    def describe(self) -> dict[str, Any]:
        """Name and addresses, and after `connect` what the servers say of themselves."""
        return {"name": "sglang_server", "url": " ".join(server.url for server in self._servers), **self._servers[0].info}

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str) -> Generation:
        """Samples one turn. Raises EngineError when a server refuses, answers nonsense, or none can be reached."""
        if request_id in self._requests:
            raise EngineError(f"request id {request_id} is already in flight; each request needs its own")
        check_sampling(sampling)
        body = {"input_ids": list(prompt_ids), "sampling_params": dict(sampling), "return_logprob": True, "stream": False}
        try:
            return read_answer(await self._ask(body, request_id))
        finally:
            self._requests.pop(request_id, None)

    async def _ask(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        for attempt in range(1, self._attempts + 1):
            server = await self._server()
            rid = request_id if attempt == 1 else uuid.uuid4().hex
            self._requests[request_id] = server, rid
            answer = asyncio.ensure_future(server.generate({"rid": rid, **body}))
            try:
                await asyncio.wait((answer,))
                return answer.result()
            except ServerFailedError as error:
                failure = str(error)
            except ServerLostError as error:
                failure = str(error)
                server.lost(failure)
            except asyncio.CancelledError:
                self._abort_in_background(server, rid)
                cut_off = await interruption(answer)
                answer.cancel()
                raise cut_off from None
            self._abort_in_background(server, rid)
            if attempt < self._attempts:
                await asyncio.sleep(_backoff_s(attempt))
        raise EngineError(f"{server.url} failed, the turn was tried {self._attempts} times, last with {failure}")

    async def _server(self) -> Server:
        """The server of the conversation that asks, which is the running task; where that is down, the least loaded one."""
        try:
            async with asyncio.timeout(self._wait_s):
                while not self._any_up.is_set():
                    await self._any_up.wait()
        except TimeoutError as error:
            trouble = "; ".join(f"{server.url}: {server.trouble}" for server in self._servers)
            raise EngineError(f"no server came back within {self._wait_s:g} s: {trouble}") from error
        conversation = asyncio.current_task()
        up = [server for server in self._servers if server.is_up]
        for server in up:
            if conversation in server.conversations:
                return server
        chosen = min(up, key=lambda server: len(server.conversations))
        if conversation:
            for server in self._servers:
                server.conversations.discard(conversation)
            chosen.conversations.add(conversation)
        return chosen

    def _note_change(self) -> None:
        if any(server.is_up for server in self._servers):
            self._any_up.set()
        else:
            self._any_up.clear()

    async def abort(self, request_id: str) -> None:
        """Stops a running or queued request: its `generate` returns what it has, with finish reason "abort"."""
        if request := self._requests.get(request_id):
            server, rid = request
            await server.abort(rid)

    def _abort_in_background(self, server: Server, rid: str) -> None:
        task = asyncio.create_task(server.abort(rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def close(self) -> None:
        """Closes the connections, after the aborts that are on their way; the servers go on. Safe to call twice."""
        await asyncio.gather(*self._aborts)
        for server in self._servers:
            await server.close()


def _backoff_s(attempt: int) -> float:
    """Exponential with jitter: servers that come back are not met by everybody at once."""
    return random.uniform(0.5, 1.0) * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (attempt - 1))
