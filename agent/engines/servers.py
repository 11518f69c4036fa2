"""Running SGLang servers as one engine: sticky routing, retries, fail-over.

Invariants: `/generate` is called for a conversation's turns, and to score recorded ones. A
conversation stays with one server while that is up, because its prefix is cached there. A turn is
sent again only if its answer can no longer come (no connection, a broken one, a server that hangs,
a 5xx, a full queue), each time under a new request id, and the one before is aborted. A
conversation owns its tokens, so it continues from its last turn on any server. A cancelled turn is
aborted on its server. Answers are checked like those of the in-process engine.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from agent.engines.engine import Generation, SamplingParams
from agent.engines.evidence import EvidenceRequest
from agent.engines.health import NotReadyError
from agent.engines.pictures import native_fields, version_problem
from agent.engines.scoring import Scores, read_scores, score_request
from agent.engines.server import (
    SILENCE_S,
    Server,
    ServerBusyError,
    ServerFailedError,
    ServerLostError,
)
from agent.engines.sglang import Read, check_sampling, interruption, read_answer
from agent.engines.sticky import asking_conversation, place_of
from agent.errors import ConfigError, EngineError, EngineStartError
from conversations.images.placing import PlacedImage
from conversations.session.ids import PathIds
from conversations.tokens import TokenIds

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0


class SGLangServerEngine:
    """The servers at `urls`.

    `max_connections`, to each server, should be the number of conversations that run at once. A
    turn may take `read_timeout_s` and is sent at most `attempts` times. While no server is up, or
    the queue of its server is full, it waits up to `wait_s`, the time that a restart may take.
    Raises ConfigError if an address is not valid.
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
            raise ConfigError(
                "rollout.server.urls must name one server or several different ones, "
                f"got {len(urls)}"
            )
        self._servers = [
            Server(
                url,
                api_key,
                max_connections=max_connections,
                read_timeout_s=read_timeout_s,
                changed=self._note_change,
            )
            for url in urls
        ]
        self._attempts = attempts
        self._wait_s = wait_s
        self._any_up = asyncio.Event()
        self._any_up.set()
        self._requests: dict[str, tuple[Server, str]] = {}
        self._aborts: dict[asyncio.Task[None], tuple[Server, str]] = {}

    async def connect(self) -> None:
        """Checks that every server is up and that all serve the same model.

        Raises EngineStartError, after closing all connections.
        """
        try:
            await asyncio.gather(*(self._connect(server) for server in self._servers))
            models = {
                model: server.url
                for server in self._servers
                if (model := server.info.get("model_path"))
            }
            if len(models) > 1:
                served = ", ".join(f"{url} {model}" for model, url in models.items())
                raise EngineStartError(
                    f"the servers of rollout.server.urls serve different models: {served}"
                )
        except BaseException:
            await self.close()
            raise

    async def _connect(self, server: Server) -> None:
        try:
            server.info = await server.ready()
        except NotReadyError as error:
            raise EngineStartError(
                f"no SGLang server is ready at {server.url}: {error}; check rollout.server.urls"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Name and addresses; after `connect` also the model and version that the servers report.

        The weights are not among them: each turn records those that sampled it.
        """
        reported = {k: value for k, value in self._reported().items() if k != "weight_version"}
        return {
            "name": "sglang_server",
            "url": " ".join(server.url for server in self._servers),
            **reported,
        }

    def served(self) -> dict[str, str]:
        """The model and weights that the servers reported to `connect`.

        Keys `model_path` and `weight_version`; a key that no server reports is left out.
        """
        return {
            key: value
            for key, value in self._reported().items()
            if key in ("model_path", "weight_version")
        }

    def _reported(self) -> dict[str, str]:
        return next((server.info for server in self._servers if server.info), {})

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        evidence: EvidenceRequest | None = None,
        images: Sequence[PlacedImage] = (),
    ) -> Generation:
        """Samples one turn.

        Raises EngineError if a server refuses, its answer is not data, or no server can be reached.
        """
        if request_id in self._requests:
            raise EngineError(
                f"request id {request_id} is already in flight; each request needs its own"
            )
        check_sampling(sampling)
        prompt: dict[str, Any] = {"input_ids": _as_json(prompt_ids)}
        if images:
            prompt = await native_fields(list(prompt_ids), images)
        body = {
            **prompt,
            "sampling_params": dict(sampling),
            "return_logprob": True,
            "stream": False,
            **(evidence.fields() if evidence else {}),
        }
        read = functools.partial(read_answer, asked=evidence)
        try:
            return read(await self._ask(body, request_id, read))
        finally:
            self._requests.pop(request_id, None)

    def image_problem(self) -> str:
        """Why these servers cannot be given images; empty if they can."""
        problems = [version_problem(server.info.get("version")) for server in self._servers]
        return next(filter(None, problems), "")

    async def score(self, ids: Sequence[int], first: int, *, likeliest: int) -> Scores:
        """The log-probs of `ids[first:]`; see `agent.engines.scoring`."""
        request_id = uuid.uuid4().hex
        try:
            answer = await self._ask(score_request(ids, first, likeliest), request_id)
        finally:
            self._requests.pop(request_id, None)
        return read_scores(answer, ids, first, likeliest)

    async def _ask(
        self, body: dict[str, Any], request_id: str, read: Read = read_answer
    ) -> dict[str, Any]:
        budget = RetryBudget(self._attempts, self._wait_s)
        rid = request_id
        while True:
            server = await self._server()
            self._requests[request_id] = server, rid
            try:
                return await self._answer(server, {"rid": rid, **body}, read)
            except ServerBusyError as error:
                server.doubt()
                pause_s = budget.after_busy_s(server.url, error)
            except (ServerFailedError, ServerLostError) as error:
                if isinstance(error, ServerLostError):
                    server.lost(str(error))
                self._abort_in_background(server, rid)
                pause_s = budget.after_failure_s(server.url, error)
            await asyncio.sleep(pause_s)
            rid = uuid.uuid4().hex

    async def _answer(self, server: Server, body: dict[str, Any], read: Read) -> dict[str, Any]:
        """The server's answer. Raises ServerLostError if the server is found to hang."""
        outages = server.outages
        answer = asyncio.ensure_future(server.generate(body))
        try:
            while not (await asyncio.wait((answer,), timeout=SILENCE_S))[0]:
                if server.outages > outages:
                    answer.cancel()
                    raise ServerLostError(f"it hangs: {server.trouble}")
                server.doubt_if_silent()
            return answer.result()
        except asyncio.CancelledError:
            self._abort_in_background(server, body["rid"])
            cut_off = await interruption(answer, read)
            answer.cancel()
            raise cut_off from None

    async def _server(self) -> Server:
        """The server of the conversation that asks.

        If that server is down, the least loaded one of the others.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                while not self._any_up.is_set():
                    await self._any_up.wait()
        except TimeoutError as error:
            trouble = "; ".join(f"{server.url}: {server.trouble}" for server in self._servers)
            raise EngineError(
                f"no server came back within {self._wait_s:g} s: {trouble}"
            ) from error
        conversation = asking_conversation()
        up = [server for server in self._servers if server.is_up]
        chosen = up[place_of(conversation, [server.conversations for server in up])]
        for server in self._servers:
            if server is not chosen:  # it has moved
                server.conversations.discard(conversation)
        return chosen

    def _note_change(self) -> None:
        if any(server.is_up for server in self._servers):
            self._any_up.set()
        else:
            self._any_up.clear()

    async def abort(self, request_id: str) -> None:
        """Stops a running or queued request: `generate` returns what was sampled, as "abort"."""
        if request := self._requests.get(request_id):
            server, rid = request
            await server.abort(rid)

    def _abort_in_background(self, server: Server, rid: str) -> None:
        task = asyncio.create_task(server.abort(rid))
        self._aborts[task] = server, rid
        task.add_done_callback(
            lambda done: None if done.cancelled() else self._aborts.pop(done, None)
        )

    async def close(self) -> None:
        """Closes the connections; the servers keep running. Safe to call twice.

        Aborts that are under way are sent first: at the end of a loop all its tasks are cancelled,
        those aborts among them.
        """
        aborts, self._aborts = self._aborts, {}
        for task in aborts:
            task.cancel()
        await asyncio.gather(*(server.abort(rid) for server, rid in aborts.values()))
        for server in self._servers:
            await server.close()


def _as_json(prompt_ids: Sequence[int]) -> Any:
    """Ids for a request's body. Those of a conversation keep their JSON text from turn to turn."""
    if isinstance(prompt_ids, TokenIds | PathIds):
        return orjson.Fragment(prompt_ids.json())
    return list(prompt_ids)


class RetryBudget:
    """The retries of one turn: `attempts` times if servers fail, for `wait_s` if they are busy."""

    def __init__(self, attempts: int, wait_s: float) -> None:
        self._attempts, self._wait_s = attempts, wait_s
        self._failed = self._busy = 0
        self._until: float | None = None

    def after_failure_s(self, url: str, error: Exception) -> float:
        """Seconds to wait before the next try. Raises EngineError after the last one."""
        self._failed, self._busy, self._until = self._failed + 1, 0, None
        if self._failed == self._attempts:
            raise EngineError(
                f"{url} failed, the turn was tried {self._attempts} times, last with {error}"
            ) from error
        return _backoff_s(self._failed)

    def after_busy_s(self, url: str, error: ServerBusyError) -> float:
        """The same after a busy server's answer, which does not count as a try.

        At least as long as the server said.
        """
        now = time.monotonic()
        self._until = self._until or now + self._wait_s
        if now >= self._until:
            raise EngineError(
                f"{url} took no request for {self._wait_s:g} s, last with {error}"
            ) from error
        self._busy += 1
        return min(max(0.0, error.retry_after_s or 0.0) + _backoff_s(self._busy), self._until - now)


def _backoff_s(attempt: int) -> float:
    """Exponential with jitter: a server that comes back does not get all requests at once."""
    return random.uniform(0.5, 1.0) * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (attempt - 1))
