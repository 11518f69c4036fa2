"""An MCP server as its tools share it, and the list of what it offers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import tempfile
import threading
from collections.abc import Coroutine
from typing import IO, Any, TypeVar

from tools.base import BackendError, ToolConfigError
from tools.mcp.config import McpServerConfig
from tools.mcp.connection import CallAnswer, Connection, ReconnectingConnection

SLACK_S = 10.0
HEAR_S = 0.5

T = TypeVar("T")


class McpServer:
    """A server as its tools share it: one connection, or one per trajectory (`per_trajectory`)."""

    def __init__(self, config: McpServerConfig, timeout_s: float) -> None:
        self.config = config
        self._read_timeout_s = timeout_s + SLACK_S
        self._log: IO[str] | None = None
        self._shared: ReconnectingConnection | None = None
        self._connections: dict[str, tuple[ReconnectingConnection, int]] = {}

    async def listed(self) -> list[dict[str, Any]]:
        """The server's list of tools, over a connection of its own.

        Raises BackendError and McpError.
        """
        connection = await Connection.open(self.config, self._open_log(), self._read_timeout_s)
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                return await connection.tools()
        except TimeoutError as error:
            raise BackendError(
                f"{self.config.shown} did not list its tools within "
                f"{self.config.start_timeout_s:g} s"
            ) from error
        finally:
            await connection.close()
            self._close_log()

    async def start(self) -> None:
        """Opens the shared connection. Raises ToolConfigError if the server does not answer."""
        if not self.config.per_trajectory:
            try:
                await self._shared_connection().connection()
            except BackendError as error:
                raise ToolConfigError(str(error)) from error

    def hold(self, trajectory: str) -> None:
        """Counts a tool of a trajectory in; with `per_trajectory` its first call connects."""
        if self.config.per_trajectory:
            connection, users = self._connections.get(trajectory) or (
                self._new_connection(stateful=True),
                0,
            )
            self._connections[trajectory] = (connection, users + 1)

    async def drop(self, trajectory: str) -> None:
        """Counts a tool of a trajectory out; the last one closes its connection."""
        if trajectory not in self._connections:
            return
        connection, users = self._connections.pop(trajectory)
        if users > 1:
            self._connections[trajectory] = (connection, users - 1)
        else:
            await connection.close()

    async def call(self, trajectory: str, name: str, arguments: dict[str, Any]) -> CallAnswer:
        """The tool's answer. Raises McpError and BackendError."""
        connection = (
            self._connections[trajectory][0]
            if self.config.per_trajectory
            else self._shared_connection()
        )
        return await connection.call(name, arguments)

    async def close(self) -> None:
        """Closes every connection. Safe to call twice."""
        connections = [connection for connection, _ in self._connections.values()]
        shared, self._shared = self._shared, None
        self._connections.clear()
        await asyncio.gather(
            *(connection.close() for connection in [*connections, *([shared] if shared else [])])
        )
        self._close_log()

    def _shared_connection(self) -> ReconnectingConnection:
        self._shared = self._shared or self._new_connection(stateful=False)
        return self._shared

    def _new_connection(self, *, stateful: bool) -> ReconnectingConnection:
        return ReconnectingConnection(
            self.config, self._open_log(), read_timeout_s=self._read_timeout_s, stateful=stateful
        )

    def _open_log(self) -> IO[str]:
        """Where started servers write stderr: `log`, or a file that ends with this process."""
        if self._log is None:
            try:
                self._log = (
                    open(self.config.log, "a+")  # noqa: SIM115 - closed with the server
                    if self.config.log
                    else tempfile.TemporaryFile("a+")  # noqa: SIM115
                )
            except OSError as error:
                raise ToolConfigError(
                    f"mcp.log: {self.config.log} cannot be written: {error.strerror}"
                ) from error
        return self._log

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log:
            log.close()


def run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, from a thread with a loop of its own: this thread may have one."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def work() -> None:
        with contextlib.closing(loop):
            try:
                outcome.set_result(loop.run_until_complete(task))
            except BaseException as error:
                outcome.set_exception(error)

    threading.Thread(target=work, name="turntrace-mcp", daemon=True).start()
    try:
        while not outcome.done():  # short waits: a Ctrl-C is handled only between them
            concurrent.futures.wait((outcome,), timeout=HEAR_S)
        return outcome.result()
    except KeyboardInterrupt:  # the started server is ended first
        loop.call_soon_threadsafe(task.cancel)
        concurrent.futures.wait((outcome,))
        raise
