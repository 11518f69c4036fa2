"""The client of a running SGLang server: native `POST /generate` with token ids, over one connection pool.

Invariants: `/generate` is called for a conversation's turns only; a request is sent again only when it cannot have
been answered (no connection, or a 5xx), each time under a request id of its own; a cancelled turn is aborted on the
server. Answers are checked as those of the in-process engine are.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Sequence
from typing import Any

import httpx

from agent.engines.engine import Generation, SamplingParams
from agent.engines.sglang import check_sampling, read_answer
from agent.errors import ConfigError, EngineError, EngineStartError
from agent.redact import without_userinfo

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0
"""Idle connections are dropped before the server does it (after 5 s), which would break the turn that takes one up then."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0


class SGLangServerEngine:
    """One server. `max_connections` should be the number of conversations that run at once.

    A turn may take `read_timeout_s`; `attempts` counts the first try. Raises ConfigError unless `urls` names exactly
    one http(s) server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        *,
        max_connections: int = 1000,
        read_timeout_s: float = 3600.0,
        attempts: int = 4,
    ) -> None:
        url = _one_url(urls)
        self._url = without_userinfo(url)
        self._attempts = attempts
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # A turn that waits in the pool would wait in the server's queue otherwise: no limit on that time.
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=KEEPALIVE_S),
        )
        # Aborts must not queue behind the generations that fill the pool.
        self._control = httpx.AsyncClient(base_url=url, headers=self._client.headers, timeout=CONNECT_TIMEOUT_S)
        self._rids: dict[str, str] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._info: dict[str, Any] = {}

    async def connect(self) -> None:
        """Checks that the server is up and reads what it serves, for `describe`. Raises EngineStartError."""
        try:
            (await self._control.get("/health")).raise_for_status()
            info = (await self._control.get("/get_server_info")).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineStartError(f"no SGLang server is ready at {self._url}: {_reason(error)}; check rollout.server.urls") from error
        self._info = info if isinstance(info, dict) else {}

    def describe(self) -> dict[str, Any]:
        """Name and address, and after `connect` what the server says of itself."""
        told: dict[str, Any] = {key: self._info[key] for key in ("model_path", "version", "dtype") if key in self._info}
        return {"name": "sglang_server", "url": self._url, **told}

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str) -> Generation:
        """Samples one turn. Raises EngineError when the server refuses, answers nonsense, or stays unreachable."""
        if request_id in self._rids:
            raise EngineError(f"request id {request_id} is already in flight; each request needs its own")
        check_sampling(sampling)
        body = {"input_ids": list(prompt_ids), "sampling_params": dict(sampling), "return_logprob": True, "stream": False}
        try:
            return read_answer(await self._post(body, request_id))
        finally:
            self._rids.pop(request_id, None)

    async def _post(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        for attempt in range(1, self._attempts + 1):
            self._rids[request_id] = rid = request_id if attempt == 1 else uuid.uuid4().hex
            try:
                response = await self._client.post("/generate", json={"rid": rid, **body})
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = _reason(error)
            except httpx.HTTPError as error:
                # It may still be generating an answer that nobody will read.
                await self._abort_rid(rid)
                raise EngineError(f"the connection to {self._url} broke: {_reason(error)}") from error
            except asyncio.CancelledError:
                self._abort_in_background(rid)
                raise
            else:
                if response.status_code < 500:
                    return _answer(response)
                failure = f"status {response.status_code}: {_message(response)}"
            if attempt < self._attempts:
                await asyncio.sleep(_backoff_s(attempt))
        raise EngineError(f"{self._url} failed {self._attempts} times, last with {failure}")

    async def abort(self, request_id: str) -> None:
        """Stops a running or queued request: its `generate` returns what it has, with finish reason "abort"."""
        if rid := self._rids.get(request_id):
            await self._abort_rid(rid)

    def _abort_in_background(self, rid: str) -> None:
        task = asyncio.create_task(self._abort_rid(rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort_rid(self, rid: str) -> None:
        with contextlib.suppress(httpx.HTTPError):  # the server is gone, and the request with it
            await self._control.post("/abort_request", json={"rid": rid})

    async def close(self) -> None:
        """Closes the connections, after the aborts that are on their way; the server goes on. Safe to call twice."""
        await asyncio.gather(*self._aborts)
        await self._client.aclose()
        await self._control.aclose()


def _one_url(urls: Sequence[str]) -> str:
    if len(urls) != 1:
        raise ConfigError(f"rollout.server.urls must name one server, got {len(urls)}; several go behind an SGLang router")
    url = urls[0].rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"rollout.server.urls: {without_userinfo(urls[0])!r} must start with http:// or https://")
    return url


def _answer(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise EngineError(f"the server refused the request with status {response.status_code}: {_message(response)}")
    try:
        answer = response.json()
    except ValueError as error:
        raise EngineError(f"the server's answer is not JSON: {response.text[:200]!r}") from error
    if not isinstance(answer, dict):
        raise EngineError(f"the server's answer is a {type(answer).__name__}, not an object")
    return answer


def _message(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    try:
        body = response.json()
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:500]


def _backoff_s(attempt: int) -> float:
    """Exponential with jitter: servers that come back are not met by everybody at once."""
    return random.uniform(0.5, 1.0) * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (attempt - 1))


def _reason(error: Exception) -> str:
    return without_userinfo(str(error)) or type(error).__name__
