"""One SGLang server: its native HTTP API, and whether it is up.

Invariant: `is_up` becomes false if a request finds the server gone or a check finds it unwell. It
becomes true again once `/health` answers and the server still serves the same model. Only the
watcher sends requests meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
from yarl import URL

from agent.config.secrets import without_userinfo
from agent.engines.address import (
    CONNECT_TIMEOUT_S,
    authorization,
    basic_auth,
    certificates,
    connections,
    proxied,
    server_url,
)
from agent.engines.health import NotReadyError, reason, refusal, what_it_serves
from agent.engines.sticky import Conversations
from agent.errors import EngineError

HEALTH_EVERY_S = 1.0
HEALTH_S = 30.0
"""Time limit of a check: SGLang's `/health` lets the model sample a token and waits 20 s for it."""
SILENCE_S = 30.0
"""If no answer has come for so long while turns are pending, the server is checked."""
CONTROL_CONNECTIONS = 100
JSON = {"content-type": "application/json"}
BUSY = (408, 429, 502, 503)
"""A full queue, the server's own or a router's, and a proxy whose server is away for the moment."""


class ServerLostError(Exception):
    """No connection, or one that broke before the answer: the sampled tokens are lost."""


class ServerFailedError(Exception):
    """The server answered with a 5xx."""


class ServerBusyError(Exception):
    """The server takes no request now.

    `retry_after_s`: seconds until it will, None if not stated.
    """

    def __init__(self, text: str, retry_after_s: float | None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Server:
    """A server at `url`.

    `conversations` are the tasks whose turns it serves. `changed` is called when `is_up` changes.
    `info` is its first report of itself. `outages` counts the times it was found to hang; requests
    sent before are lost. Raises ConfigError if the address or the key is not valid.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        max_connections: int,
        read_timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        address, headers, context = (
            server_url(url),
            authorization(api_key),
            certificates(),
        )
        self.url = without_userinfo(str(address))
        # Parsed once, not for each request.
        self._generate_url = URL(f"{address.copy_with(userinfo=b'')}/generate", encoded=True)
        self._headers = {**JSON, **headers, **basic_auth(address)}
        self._read_timeout_s = read_timeout_s
        self._turns = connections(address, context, max_connections)
        # Aborts and health checks must not queue behind the generations that fill the pool.
        self._control = httpx.AsyncClient(
            base_url=address,
            headers=headers,
            timeout=httpx.Timeout(HEALTH_S, connect=CONNECT_TIMEOUT_S),
            transport=connections(address, context, CONTROL_CONNECTIONS),
        )
        self._proxied = proxied(address)
        self._changed = changed
        self._watcher: asyncio.Task[None] | None = None
        self._heard = time.monotonic()
        self.info: dict[str, Any] = {}
        self.is_up = True
        self.outages = 0
        self.trouble = ""
        self.conversations = Conversations()

    async def ready(self) -> dict[str, Any]:
        """The server's report of itself; empty for a router without one. Raises NotReadyError."""
        try:
            return await what_it_serves(self._control)
        except NotReadyError as error:
            raise NotReadyError(f"{error}{self._proxied}") from error.__cause__

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /generate`, once. Raises the errors above, and EngineError if a retry is no use."""
        try:
            response = await self._turns.post(
                self._generate_url,
                orjson.dumps(body),
                self._headers,
                connect_s=CONNECT_TIMEOUT_S,
                read_s=self._read_timeout_s,
            )
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            await self.abort(body["rid"])  # it may still be sampling
            raise EngineError(
                f"{self.url} did not answer within its timeout: {reason(error)}"
            ) from error
        except httpx.HTTPError as error:
            raise ServerLostError(reason(error)) from error
        self._heard = time.monotonic()
        if response.status_code in BUSY:
            raise ServerBusyError(refusal(response), retry_after_s(response))
        if response.status_code >= 500:
            raise ServerFailedError(refusal(response))
        return _answer(response)

    async def abort(self, rid: str) -> None:
        """Stops a request; the server ignores an unknown one."""
        with contextlib.suppress(httpx.HTTPError):  # the request is gone with the server
            await self._control.post("/abort_request", json={"rid": rid}, timeout=CONNECT_TIMEOUT_S)

    def lost(self, trouble: str) -> None:
        """Takes the server out of use until a check finds it well."""
        self._set_up(False, trouble)
        self.doubt()

    def doubt(self) -> None:
        """Starts a check; a server that is not well is taken out of use."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    def doubt_if_silent(self) -> None:
        """Starts a check if no answer has come for `SILENCE_S`."""
        if time.monotonic() - self._heard >= SILENCE_S:
            self.doubt()

    async def _watch(self) -> None:
        while trouble := await self._unwell():
            self._set_up(False, trouble)
            await asyncio.sleep(HEALTH_EVERY_S)
        self._heard = time.monotonic()
        self._set_up(True, "")

    def _set_up(self, is_up: bool, trouble: str) -> None:
        self.is_up, self.trouble = is_up, trouble
        self._changed()

    async def _unwell(self) -> str:
        """What is wrong with the server; empty if it is well."""
        try:
            found = await self.ready()
        except NotReadyError as error:
            self.outages += isinstance(error.__cause__, httpx.TimeoutException)
            return str(error)
        served, serves = self.info.get("model_path"), found.get("model_path")
        # One conversation is never sampled by two models.
        if served and serves and serves != served:
            return f"it came back with {serves} instead of {served}"
        return ""

    async def close(self) -> None:
        """Closes the connections; the server keeps running. Safe to call twice."""
        if self._watcher:
            self._watcher.cancel()
        await self._turns.aclose()
        await self._control.aclose()


def retry_after_s(response: httpx.Response) -> float | None:
    """The header's seconds, or those until its date."""
    given = response.headers.get("retry-after", "")
    try:
        return (
            float(given)
            if given.isdigit()
            else (email.utils.parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return None


def _answer(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise EngineError(f"the server refused the request with {refusal(response)}")
    try:
        answer = orjson.loads(response.content)
    except ValueError as error:
        raise EngineError(f"the server's answer is not JSON: {response.text[:200]!r}") from error
    if not isinstance(answer, dict):
        raise EngineError(f"the server's answer is a {type(answer).__name__}, not an object")
    return answer
