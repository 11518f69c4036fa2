"""Rule: however HTTP fails, the call is answered at once; the session and other calls live on."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tools.base import BackendError
from tools.mcp.config import McpServerConfig
from tools.mcp.connection import (
    Connection,
    ConnectionLostError,
    NotSentError,
    ReconnectingConnection,
)


def http(
    body: bytes,
    content_type: str = "application/json",
    status: str = "200 OK",
    length: int | None = None,
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\n"
        f"content-type: {content_type}\r\n"
        f"content-length: {len(body) if length is None else length}\r\n"
        f"\r\n"
    )
    return head.encode() + body


def result(request_id: Any, said: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": said}).encode()


def said(request_id: Any, text: str) -> bytes:
    return result(request_id, {"content": [{"type": "text", "text": text}]})


def event(data: bytes) -> bytes:
    return b"event: message\ndata: " + data + b"\n\n"


EVENTS = "text/event-stream"
ANSWERS: dict[str, Any] = {
    "json": lambda i: http(said(i, "fine")),
    "events": lambda i: http(event(said(i, "fine")), EVENTS),
    "slow": lambda i: http(said(i, "slow but fine")),
    "error": lambda i: http(
        json.dumps(
            {"jsonrpc": "2.0", "id": i, "error": {"code": -32602, "message": "wrong"}}
        ).encode()
    ),
    "500": lambda i: http(b"oh no", "text/plain", "500 Internal Server Error"),
    "401": lambda i: http(b"{}", status="401 Unauthorized"),
    "404": lambda i: http(b"", status="404 Not Found"),
    "202": lambda i: http(b"", status="202 Accepted"),
    "html": lambda i: http(b"<html>", "text/html"),
    "half json": lambda i: http(b'{"jsonrpc": "2.0"', length=1000),
    "no json": lambda i: http(b"{half"),
    "other json": lambda i: http(b"[1]"),
    "half events": lambda i: http(b"event: message\ndata: {", EVENTS, length=1000),
    "no events": lambda i: http(b"", EVENTS),
    "nonsense event": lambda i: http(event(b"nonsense"), EVENTS),
    "nothing": lambda i: b"",
    "no http": lambda i: b"\x00\x01\x02\r\n\r\n",
    "no result": lambda i: http(result(i, {"content": 7})),
}


class Backend:
    """Speaks HTTP by hand: starts sessions correctly, answers a call as the tool's name says."""

    def __init__(self) -> None:
        self.sessions = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).strip():
                headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next(
                    (
                        int(text.split(":")[1])
                        for text in headers.splitlines()
                        if text.startswith("content-length")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                answer = (
                    await self.answer(json.loads(body))
                    if line.startswith(b"POST")
                    else http(b"", status="405 Method Not Allowed")
                )
                writer.write(answer)
                await writer.drain()
                if (
                    not answer.startswith(b"HTTP/1.1 200 OK")
                    or b"content-length: 1000\r\n" in answer
                ):
                    break
        finally:
            writer.close()

    async def answer(self, message: dict[str, Any]) -> bytes:
        request_id, method = message.get("id"), message["method"]
        if method == "initialize":
            self.sessions += 1
            info = {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "serverInfo": {"name": "x", "version": "1"},
            }
            return http(result(request_id, info)).replace(
                b"\r\n\r\n", f"\r\nmcp-session-id: {self.sessions}\r\n\r\n".encode(), 1
            )
        if request_id is None:
            return http(b"", status="202 Accepted")
        name = message["params"]["name"]
        if name == "slow":
            await asyncio.sleep(0.3)
        answer: bytes = ANSWERS[name](request_id)
        return answer


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
    yield made
    server.close()


@pytest_asyncio.fixture
async def link(backend: Backend) -> AsyncIterator[ReconnectingConnection]:
    with tempfile.TemporaryFile("a+") as log:
        made = ReconnectingConnection(McpServerConfig(url=backend.url), log, read_timeout_s=60)
        yield made
        await made.close()


async def outcome(link: ReconnectingConnection, name: str) -> str:
    try:
        return str((await link.call(name, {})).content[0].text)  # type: ignore[union-attr]
    except BackendError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json", "fine"),
        ("events", "fine"),
        ("500", "HTTP 500 Internal Server Error"),
        ("401", "HTTP 401 Unauthorized"),
        ("202", "HTTP 202 without a JSON-RPC answer"),
        ("html", "HTTP 200 without a JSON-RPC answer"),
        ("half json", "RemoteProtocolError"),
        ("no json", "HTTP 200 without a JSON-RPC answer"),
        ("other json", "HTTP 200 without a JSON-RPC answer"),
        ("half events", "RemoteProtocolError"),
        ("no events", "the answer ended before it was complete"),
        ("nonsense event", "the answer ended before it was complete"),
        ("nothing", "RemoteProtocolError: Server disconnected without sending a response"),
        ("no http", "RemoteProtocolError"),
        ("no result", "answered what is not MCP"),
    ],
)
async def test_a_call_is_answered_and_the_others_live_on(
    backend: Backend, link: ReconnectingConnection, name: str, says: str
) -> None:
    async with asyncio.timeout(30):
        beside = asyncio.create_task(outcome(link, "slow"))
        found = await outcome(link, name)
        assert says in found
        assert found == "fine" or found.startswith("BackendError: ")
        assert await beside == "slow but fine"
        assert await outcome(link, "json") == "fine"
    assert backend.sessions == 1


async def test_a_server_that_forgot_the_session_is_given_a_new_one(
    backend: Backend, link: ReconnectingConnection
) -> None:
    assert await outcome(link, "json") == "fine"
    assert "was restarted" in await outcome(link, "404")
    assert backend.sessions == 2


async def test_a_closed_connection_loses_what_is_in_flight_and_sends_nothing_more(
    backend: Backend,
) -> None:
    with tempfile.TemporaryFile("a+") as log:
        connection = await Connection.open(McpServerConfig(url=backend.url), log, read_timeout_s=60)
        calling = asyncio.create_task(connection.call("slow", {}))
        await asyncio.sleep(0.1)
        await connection.close()
        with pytest.raises(ConnectionLostError):
            await calling
        with pytest.raises(NotSentError):
            await connection.call("json", {})
