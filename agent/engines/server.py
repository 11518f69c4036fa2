"""One SGLang server: its native HTTP API, and whether it is up.

Invariant: `is_up` is false from the moment a request found the server gone until `/health` answers again and it still
serves the model it served before; nobody but the watcher asks meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import httpx

from agent.errors import ConfigError, EngineError
from agent.redact import without_userinfo

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0
"""Idle connections are dropped before the server does it (after 5 s), which would break the turn that takes one up then."""
HEALTH_EVERY_S = 1.0
POOL_SIZE = 4
"""Connections in one httpx client: for each request it walks all that it has, which costs 10 ms of CPU with 256 of them."""

INFO_KEYS = ("model_path", "version", "dtype")


class ServerLostError(Exception):
    """No connection, or one that broke before the answer: what the server sampled, nobody has seen."""


class ServerFailedError(Exception):
    """The server is there and answered with a 5xx."""


class Server:
    """`conversations` are the tasks whose turns it serves. `changed` is called when `is_up` changes."""

    def __init__(self, url: str, api_key: str | None, *, max_connections: int, read_timeout_s: float, changed: Callable[[], None]) -> None:
        self.url = without_userinfo(url.rstrip("/"))
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"rollout.server.urls: {self.url!r} must start with http:// or https://")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A turn that waits in the pool would wait in the server's queue otherwise: no limit on that time.
        timeout = httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        context = httpx.create_ssl_context()
        self._clients = [
            httpx.AsyncClient(
                base_url=url,
                headers=headers,
                timeout=timeout,
                verify=context,
                limits=httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=KEEPALIVE_S),
            )
            for size in _pool_sizes(max_connections)
        ]
        self._free = _pool_sizes(max_connections)
        # Aborts and health checks must not queue behind the generations that fill the pool.
        self._control = httpx.AsyncClient(base_url=url, headers=headers, timeout=CONNECT_TIMEOUT_S)
        self._changed = changed
        self._watcher: asyncio.Task[None] | None = None
        self.info: dict[str, Any] = {}
        self.is_up = True
        self.trouble = ""
        self.conversations: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    async def ready(self) -> dict[str, Any]:
        """What the server says of itself. Raises httpx.HTTPError or ValueError unless it is healthy."""
        (await self._control.get("/health")).raise_for_status()
        told = (await self._control.get("/get_server_info")).raise_for_status().json()
        return {key: told[key] for key in INFO_KEYS if key in told} if isinstance(told, dict) else {}

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /generate`, once. Raises ServerLostError, ServerFailedError, and EngineError where asking again is no use."""
        try:
            response = await self._post(body)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            await self.abort(body["rid"])  # it may still be generating an answer that nobody will read
            raise EngineError(f"{self.url} did not answer within its timeout: {reason(error)}") from error
        except httpx.HTTPError as error:
            raise ServerLostError(reason(error)) from error
        if response.status_code >= 500:
            raise ServerFailedError(f"status {response.status_code}: {_message(response)}")
        return _answer(response)

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        """Through the pool with the most free connections."""
        index = max(range(len(self._free)), key=self._free.__getitem__)
        self._free[index] -= 1
        try:
            return await self._clients[index].post("/generate", json=body)
        finally:
            self._free[index] += 1

    async def abort(self, rid: str) -> None:
        """Stops a request; one that the server does not know is ignored."""
        with contextlib.suppress(httpx.HTTPError):  # the server is gone, and the request with it
            await self._control.post("/abort_request", json={"rid": rid})

    def lost(self, trouble: str) -> None:
        """Takes the server out until it answers again."""
        self.trouble = trouble
        if self.is_up:
            self.is_up = False
            self._watcher = asyncio.create_task(self._watch())
            self._changed()

    async def _watch(self) -> None:
        while True:
            if await self._is_back():
                break
            await asyncio.sleep(HEALTH_EVERY_S)
        self.is_up = True
        self._changed()

    async def _is_back(self) -> bool:
        try:
            found = await self.ready()
        except (httpx.HTTPError, ValueError) as error:
            self.trouble = reason(error)
            return False
        served, serves = self.info.get("model_path"), found.get("model_path")
        if self.info and serves != served:  # one conversation is never sampled by two models
            self.trouble = f"it came back with {serves} where it had {served}"
            return False
        return True

    async def close(self) -> None:
        """Closes the connections; the server goes on. Safe to call twice."""
        if self._watcher:
            self._watcher.cancel()
        for client in (*self._clients, self._control):
            await client.aclose()


def _pool_sizes(connections: int) -> list[int]:
    """`connections` in pools of POOL_SIZE at most."""
    return [min(POOL_SIZE, connections - start) for start in range(0, connections, POOL_SIZE)]


def reason(error: Exception) -> str:
    """An httpx error for a message: without the password of an address, never empty."""
    return without_userinfo(str(error)) or type(error).__name__


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
