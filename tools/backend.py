"""A tool's backend over HTTP: its address, one client for all calls, BackendError for each failure.

A backend is the user's, at an address, or an embedded one, which is started when it is first needed
and again after it has died. Only connecting is retried: the dispatcher decides about calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from tools.base import BackendError, ToolConfigError, ToolsError
from tools.servers.embedded import EmbeddedServer
from tools.transport import AiohttpTransport

EMBEDDED = "embedded"
"""What a config may give in place of an address; giving nothing means the same."""

_CONNECT_S = 10.0
_CONNECT_RETRIES = 3
# uvicorn drops a connection that was idle for 5 s; a call that is sent on it just then is lost.
_KEEPALIVE_S = 2.0
_SAID_CHARS = 200
_MAX_ANSWER_MIB = 64
_HEADERS = {"content-type": "application/json", "accept": "application/json"}


def remote_url(key: str, given: object, path: str) -> httpx.URL | None:
    """The address in `config.KEY`, with `path` if it has none; None for an embedded backend.

    Raises ToolConfigError.
    """
    if given is None or given == EMBEDDED:
        return None
    try:
        url = httpx.URL(given) if isinstance(given, str) else httpx.URL()
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ToolConfigError(
            f"config.{key} must be {EMBEDDED!r} or an http(s) address, got {given!r}"
        )
    return url.copy_with(path=path) if url.path in ("", "/") else url


@dataclass(slots=True)
class _OnLoop:
    """What belongs to one event loop: a closed loop's connections cannot be used or closed."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    starting: asyncio.Lock


class Backend:
    """One tool's backend.

    name: what its errors call it
    embedded: finds the server to start if `remote` is None; it may take long but must not block
    connections: calls at a time
    timeout_s: of each call
    """

    def __init__(
        self,
        name: str,
        remote: httpx.URL | None,
        embedded: Callable[[], Awaitable[EmbeddedServer]],
        path: str,
        *,
        connections: int,
        timeout_s: float,
    ) -> None:
        self._name = name
        self._remote = remote
        self._find = embedded
        self._path = path
        self._connections = connections
        self._timeout_s = timeout_s
        self._server: EmbeddedServer | None = None
        self._here: _OnLoop | None = None

    async def start(self) -> None:
        """Starts an embedded backend, or probes a remote one once. Raises ToolsError."""
        if self._remote is None:
            await self._url(self._on_loop())
            return
        try:
            await self.send("GET")
        except BackendError as error:
            raise ToolsError(str(error)) from error

    async def post(self, content: bytes) -> bytes:
        """The answer to a JSON request. Raises BackendError if its status is not 2xx."""
        return self.succeeded(await self.send("POST", content)).content

    async def send(
        self, method: str, content: bytes | None = None, path: str | None = None
    ) -> httpx.Response:
        """The answer, whatever its status. Raises BackendError if there is none.

        `path`: another one than the backend's, relative to it.
        """
        here = self._on_loop()
        try:
            url = await self._url(here)
        except (ToolsError, OSError) as error:
            raise BackendError(f"{self._name} cannot be started: {error}") from error
        url = url if path is None else url.join(path)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                here.client.stream(method, url, content=content, headers=_HEADERS) as answer,
            ):
                return await self._bounded(answer)
        except TimeoutError as error:
            raise BackendError(
                f"{self._at_address(url)} did not answer within {self._timeout_s:g} s"
            ) from error
        except httpx.HTTPError as error:
            raise BackendError(
                f"{self._at_address(url)}: {type(error).__name__}: {error}"
            ) from error

    def succeeded(self, answer: httpx.Response) -> httpx.Response:
        """The answer. Raises BackendError if its status is not 2xx."""
        if not answer.is_success:
            raise BackendError(
                f"{self._at_address(answer.url)} answered {answer.status_code}: "
                f"{answer.text[:_SAID_CHARS]}"
            )
        return answer

    async def _bounded(self, answer: httpx.Response) -> httpx.Response:
        """The answer with its body. Its size is bounded: a server may send without end."""
        body = bytearray()
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > _MAX_ANSWER_MIB * 2**20:
                raise BackendError(
                    f"{self._at_address(answer.url)} answered more than {_MAX_ANSWER_MIB} MiB"
                )
        return httpx.Response(answer.status_code, content=bytes(body), request=answer.request)

    def _at_address(self, url: httpx.URL) -> str:
        return f"{self._name} at {url.copy_with(username=None, password=None, query=None)}"

    async def close(self) -> None:
        """Closes the connections and releases an embedded backend. Safe to call twice."""
        here, self._here = self._here, None
        if here is not None and here.loop is asyncio.get_running_loop():
            await here.client.aclose()
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.release)

    async def _url(self, here: _OnLoop) -> httpx.URL:
        if self._remote is not None:
            return self._remote
        if self._server is None or not self._server.is_running:
            async with here.starting:
                return await self._started()
        return self._at(self._server.url())

    async def _started(self) -> httpx.URL:
        if self._server is None:
            server = await self._find()
            server.acquire()
            self._server = server
        return self._at(await asyncio.to_thread(self._server.url))

    def _at(self, address: str) -> httpx.URL:
        return httpx.URL(f"{address}{self._path}")

    def _on_loop(self) -> _OnLoop:
        loop = asyncio.get_running_loop()
        if self._here is None or self._here.loop is not loop:
            transport = AiohttpTransport(
                connections=self._connections,
                keepalive_s=_KEEPALIVE_S,
                connect_retries=_CONNECT_RETRIES,
            )
            timeout = httpx.Timeout(None, connect=_CONNECT_S)
            self._here = _OnLoop(
                loop, httpx.AsyncClient(transport=transport, timeout=timeout), asyncio.Lock()
            )
        return self._here
