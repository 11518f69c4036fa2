"""A connection to an MCP server, which can die, hang or come back, over the official client.

Invariant: a call ends. If the server dies, calls in flight fail at once; the server is told of a
cancelled call. anyio binds the SDK's contexts to the task that entered them, so each connection
owns one task that enters and leaves them. A server that was started here sees its stdin end when
this process ends, `kill -9` included; a server that ignores that stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import IO, Any, TypeVar

import httpx
import mcp
import pydantic
from anyio import BrokenResourceError, ClosedResourceError
from mcp import McpError, types
from mcp.client.session import ClientSession
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from tools.base import BackendError
from tools.mcp.config import McpServerConfig
from tools.mcp.transport import HTTP_FAILED, AnsweringTransport
from tools.reading import first_problem

R = TypeVar("R", bound=types.Result)

SESSION_TERMINATED = 32600
"""The SDK's code for a 404: the server was restarted and does not know the session."""

MAX_PAGES = 1000
SAY_S = 5.0
CONNECT_S = 10.0
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 30.0


class ConnectionLostError(BackendError):
    """The server went away during a call; whether it ran is unknown."""


class NotSentError(ConnectionLostError):
    """The server was gone before the call: it did not run."""


class ListedTools(types.Result):
    """A page of a server's tools. Each is checked by itself, so that a wrong one can be named."""

    tools: list[dict[str, Any]]
    nextCursor: str | None = None  # noqa: N815 - the protocol's name


class CallAnswer(types.Result):
    """The answer to a call, read more leniently than the SDK does.

    `content` may be missing, and may hold blocks of a later protocol.
    """

    content: list[types.ContentBlock | dict[str, Any]] = pydantic.Field(default_factory=list)
    structuredContent: Any = None  # noqa: N815 - the protocol's name
    isError: bool = False  # noqa: N815


class ReconnectingConnection:
    """A connection that opens on first use, and again after it was lost, at most every few seconds.

    stateful: a lost connection loses what the server knew. One call raises NotSentError for that,
        before another connection is opened.
    """

    def __init__(
        self,
        config: McpServerConfig,
        log: IO[str],
        *,
        read_timeout_s: float,
        stateful: bool = False,
    ) -> None:
        self._config = config
        self._log = log
        self._read_timeout_s = read_timeout_s
        self._stateful = stateful
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._retry_s = 0.0
        self._retry_at = 0.0
        self._closed = False

    async def call(self, name: str, arguments: dict[str, Any]) -> CallAnswer:
        """The tool's answer. Raises McpError, the server's answer, or BackendError: no answer."""
        connection = await self.connection()
        try:
            return await connection.call(name, arguments)
        except ConnectionLostError as error:
            if self._stateful:
                await self._forget(connection)
                raise
            if not isinstance(error, NotSentError):
                raise
        return await (await self.connection()).call(name, arguments)

    async def connection(self) -> Connection:
        """The open connection. Raises BackendError if none can be opened."""
        async with self._opening:
            connection = self._connection
            if connection and connection.is_lost:
                await self._forget(connection)
                if self._stateful:
                    raise NotSentError(
                        f"{self._config.shown} has ended, and its state of this trajectory is "
                        f"lost: {connection.reason}"
                    )
            if self._connection is None:
                self._connection = await self._opened()
            return self._connection

    async def _opened(self) -> Connection:
        if (wait_s := self._retry_at - time.monotonic()) > 0:
            raise NotSentError(
                f"{self._config.shown} could not be reached; the next attempt is in {wait_s:.1f} s"
            )
        try:
            opened = await Connection.open(self._config, self._log, self._read_timeout_s)
        except BackendError:
            self._retry_s = min(max(2 * self._retry_s, FIRST_RETRY_S), LAST_RETRY_S)
            self._retry_at = time.monotonic() + self._retry_s
            raise
        self._retry_s = 0.0
        if self._closed:
            await opened.close()
            raise NotSentError(f"{self._config.shown} was closed")
        return opened

    async def close(self) -> None:
        """Ends the connection and the server's process, for good. Safe to call twice."""
        self._closed = True
        if self._connection:
            await self._forget(self._connection)

    async def _forget(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        await connection.close()


class Connection:
    """One initialized session with a server: made by `open`, ended by `close`, or lost."""

    def __init__(self, config: McpServerConfig, log: IO[str], read_timeout_s: float) -> None:
        self._config = config
        self._log = log
        self._read_timeout_s = read_timeout_s
        self._session: ClientSession | None = None
        self._leave = asyncio.Event()
        self._notifications: set[asyncio.Task[None]] = set()
        self._ready = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._owner = asyncio.create_task(self._own(), name=f"mcp {config.shown}")
        self._owner.add_done_callback(self._ended)

    @classmethod
    async def open(cls, config: McpServerConfig, log: IO[str], read_timeout_s: float) -> Connection:
        """Starts or reaches the server. Raises BackendError with the reason in one line."""
        # The SDK logs servers' faults, partly on the root logger. That would be printed over the
        # progress display.
        logging.getLogger("mcp").addHandler(_SILENT)
        logging.getLogger().addFilter(_not_the_sdks)
        connection = cls(config, log, read_timeout_s)
        try:
            await asyncio.wait(
                (connection._ready, connection._lost),
                timeout=config.start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        except asyncio.CancelledError:
            await connection.close()
            raise
        if connection._ready.done() and not connection.is_lost:
            return connection
        reason = (
            connection.reason
            if connection.is_lost
            else f"no answer within {config.start_timeout_s:g} s"
        )
        await connection.close()
        raise NotSentError(
            f"{config.shown} could not be reached: {reason}{connection._last_words()}"
        )

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    @property
    def reason(self) -> str:
        """Why it was lost."""
        return self._lost.result() if self._lost.done() else "it is not lost"

    async def tools(self) -> list[dict[str, Any]]:
        """All pages of the server's list, as it was sent. Raises McpError and BackendError."""
        listed: list[dict[str, Any]] = []
        cursors: set[str] = set()
        cursor: str | None = None
        while len(cursors) < MAX_PAGES:
            params = types.PaginatedRequestParams(cursor=cursor)
            page = await self._request(types.ListToolsRequest(params=params), ListedTools)
            listed += page.tools
            cursor = page.nextCursor
            if not cursor:
                return listed
            if cursor in cursors:
                raise BackendError(
                    f"{self._config.shown}: its list of tools never ends: "
                    f"the cursor {cursor[:80]!r} came twice"
                )
            cursors.add(cursor)
        raise BackendError(f"{self._config.shown}: its list of tools has over {MAX_PAGES} pages")

    async def call(self, name: str, arguments: dict[str, Any]) -> CallAnswer:
        """The tool's answer; its output schema is not looked at.

        Raises McpError and ConnectionLostError.
        """
        params = types.CallToolRequestParams(name=name, arguments=arguments)
        return await self._request(types.CallToolRequest(params=params), CallAnswer)

    async def close(self) -> None:
        """Leaves the session. Ends a server that was started for it, by force if need be."""
        self._leave.set()
        if not self._ready.done():
            self._owner.cancel()
        await asyncio.wait((self._owner,))

    # ------------------------------------------------------------------ the owner's task

    async def _own(self) -> None:
        async with (
            self._transport() as (read, write),
            ClientSession(read, write, client_info=_CLIENT) as session,
        ):
            await session.initialize()
            self._session = session
            self._ready.set_result(None)
            await self._leave.wait()

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[tuple[Any, Any]]:
        config = self._config
        if config.command is not None:
            server = StdioServerParameters(
                command=config.executable,
                args=config.args,
                env=config.env,
                cwd=config.cwd,
                encoding_error_handler="replace",
            )
            async with stdio_client(server, errlog=self._log) as (read, write):  # type: ignore[arg-type]
                yield read, write
        else:
            timeout = httpx.Timeout(CONNECT_S, read=self._read_timeout_s, pool=None)
            headers = {**config.headers, "accept-encoding": "identity"}
            async with (
                httpx.AsyncClient(
                    headers=headers, transport=AnsweringTransport(), timeout=timeout
                ) as client,
                streamable_http_client(config.url or "", http_client=client) as (read, write, _),
            ):
                yield read, write

    def _ended(self, owner: asyncio.Task[None]) -> None:
        error = None if owner.cancelled() else owner.exception()
        self._lose(_leaf(error) if error else "it was closed")

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)
        self._leave.set()

    def _last_words(self) -> str:
        """The last line in the log of a started server, which may be from an earlier start."""
        if self._config.command is None:
            return ""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._log.fileno()).st_size
            tail = (
                os.pread(self._log.fileno(), 4096, max(0, size - 4096))
                .decode(errors="replace")
                .split("\n")
            )
            return next(
                (
                    f"; its last words: {line.strip()[:300]}"
                    for line in reversed(tail)
                    if line.strip()
                ),
                "",
            )
        return ""

    # ------------------------------------------------------------------ one request

    async def _request(self, request: types.ClientRequestType, result: type[R]) -> R:
        """The answer to a request. Raises ConnectionLostError if the connection is lost first."""
        pending = asyncio.ensure_future(self._send(request, result))
        try:
            await asyncio.wait((pending, self._lost), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            _abandon(pending)
            raise
        if not pending.done():
            _abandon(pending)
            raise ConnectionLostError(f"{self._config.shown} went away: {self.reason}")
        try:
            return pending.result()
        except (ClosedResourceError, BrokenResourceError) as error:
            self._lose("it had ended")
            raise NotSentError(f"{self._config.shown} had ended{self._last_words()}") from error
        except McpError as error:
            raise self._classified(error) from error
        except pydantic.ValidationError as error:
            said = first_problem(error, result)
            raise BackendError(f"{self._config.shown} answered what is not MCP: {said}") from error

    async def _send(self, request: types.ClientRequestType, result: type[R]) -> R:
        if self._session is None or self.is_lost:
            raise ClosedResourceError
        # The number that send_request takes: it awaits nothing before.
        request_id = self._session._request_id
        try:
            return await self._session.send_request(types.ClientRequest(request), result)
        except asyncio.CancelledError:
            if not self.is_lost:
                self._notify_cancelled(self._session, request_id)
            raise

    def _classified(self, error: McpError) -> Exception:
        """What failed: the session, before the call ran; the transport; or the call itself."""
        code, said = error.error.code, error.error.message
        if code == SESSION_TERMINATED:
            self._lose("it does not know the session any more")
            return NotSentError(f"{self._config.shown} was restarted")
        if code == types.CONNECTION_CLOSED:
            self._lose("it ended")
            return ConnectionLostError(
                f"{self._config.shown} ended during the call{self._last_words()}"
            )
        return BackendError(f"{self._config.shown}: {said}") if code == HTTP_FAILED else error

    def _notify_cancelled(self, session: ClientSession, request_id: int) -> None:
        """In a task of its own: a cancelled call does not wait."""
        notification = asyncio.create_task(_send_cancelled(session, request_id))
        self._notifications.add(notification)
        notification.add_done_callback(self._notifications.discard)


async def _send_cancelled(session: ClientSession, request_id: int) -> None:
    params = types.CancelledNotificationParams(
        requestId=request_id, reason="the call was cancelled"
    )
    with contextlib.suppress(Exception):
        async with asyncio.timeout(SAY_S):
            await session.send_notification(
                types.ClientNotification(types.CancelledNotification(params=params))
            )


def _abandon(pending: asyncio.Future[Any]) -> None:
    pending.add_done_callback(lambda done: done.cancelled() or done.exception())
    pending.cancel()


def _leaf(error: BaseException) -> str:
    """The first error, in one line; anyio wraps exceptions in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = str(error).splitlines()
    closed = isinstance(error, McpError) and error.error.code == types.CONNECTION_CLOSED
    if closed or isinstance(error, (ClosedResourceError, BrokenResourceError)):
        return "it ended"
    if isinstance(error, McpError):
        return said[0] if said else "it answered with an error"
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _not_the_sdks(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(_SDK)


_SDK = os.path.dirname(mcp.__file__)
_SILENT = logging.NullHandler()
_CLIENT = types.Implementation(name="turntrace", version="0.1.0")
