"""httpx over aiohttp: what arrives, how many at a time, and each failure as httpx's error."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.helpers import ROOT
from tools.transport import AiohttpTransport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(answer: Answer, port: int = 0) -> AsyncIterator[str]:
    """An HTTP server made of one function: it gets each request's head and writes what it likes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                await answer(head + await reader.readexactly(length), writer)
                await writer.drain()
                if writer.is_closing():
                    return

    async with await asyncio.start_server(serve, "127.0.0.1", port) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        listening.close()


def client(connections: int = 4, **kwargs: Any) -> httpx.AsyncClient:
    timeout = kwargs.pop("timeout", None)
    return httpx.AsyncClient(
        transport=AiohttpTransport(connections=connections, keepalive_s=2.0, **kwargs),
        timeout=timeout,
    )


async def test_a_request_arrives_as_it_was_made_and_the_answer_as_it_was_written() -> None:
    seen: list[bytes] = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)
        body = gzip.compress(b"packed")
        head = [
            "HTTP/1.1 418 Short And Stout",
            "set-cookie: a=1",
            "set-cookie: b=2",
            "content-encoding: gzip",
            f"content-length: {len(body)}",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)

    async with server(answer) as url, client() as http:
        first = await http.post(
            f"{url.replace('//', '//me:secret@')}/p%20q?x=%2F&y=1",
            content=b'{"a": 1}',
            headers=[("x-two", "1"), ("x-two", "2")],
        )
        http.cookies.clear()
        await http.get(url)
    assert (first.status_code, first.reason_phrase, first.content) == (
        418,
        "Short And Stout",
        b"packed",
    )
    assert first.headers.get_list("set-cookie") == ["a=1", "b=2"]
    head, body = seen[0].split(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert head.startswith(b"POST /p%20q?x=%2F&y=1 HTTP/1.1")
    assert [line for line in lines if line.startswith((b"x-two", b"content-"))] == [
        b"x-two: 1",
        b"x-two: 2",
        b"content-length: 8",
    ]
    assert [line for line in lines if b"bwu6c2vjcmv0" in line] == [
        b"authorization: basic bwu6c2vjcmv0"
    ]
    assert body == b'{"a": 1}'
    assert b"cookie" not in seen[1].lower()


async def test_no_redirect_is_followed() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
        )

    async with server(answer) as url, client() as http:
        assert (await http.get(url)).status_code == 302


async def test_what_finds_no_free_connection_waits_its_turn() -> None:
    at_once, most, freed = 0, 0, asyncio.Event()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 2:
            freed.set()
        await freed.wait()
        at_once -= 1
        writer.write(OK)

    async with server(answer) as url, client(connections=2) as http:
        answers = await asyncio.gather(*(http.post(url, content=b"x") for _ in range(7)))
    assert [one.text for one in answers] == ["ok"] * 7
    assert most == 2


async def closes(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def stops_in_the_midst(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK.replace(b"length: 2", b"length: 20"))
    writer.close()


async def speaks_something_else(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


async def says_nothing(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def says_half(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK[:-1])
    await writer.drain()
    await asyncio.sleep(30)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (closes, httpx.RemoteProtocolError),
        (stops_in_the_midst, httpx.ReadError),
        (speaks_something_else, httpx.RemoteProtocolError),
        (says_nothing, httpx.ReadTimeout),
        (says_half, httpx.ReadTimeout),
    ],
)
async def test_no_whole_answer_is_httpxs_error_and_nothing_is_sent_again(
    answer: Answer, error: type[Exception]
) -> None:
    asked = 0

    async def counted(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await answer(request, writer)

    async with (
        server(counted) as url,
        client(connect_retries=3, timeout=httpx.Timeout(None, read=0.3)) as http,
    ):
        with pytest.raises(error) as caught:
            await http.post(url, content=b"x")
    assert type(caught.value) is error
    assert str(caught.value)
    assert asked == 1


async def test_connecting_is_tried_again() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async with server(answer) as url:
        port = int(url.rsplit(":", 1)[1])
    async with client() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(url)
    async with client(connect_retries=10) as http:
        asking = asyncio.create_task(http.get(url))
        await asyncio.sleep(0.1)
        assert not asking.done()
        async with server(answer, port):
            assert (await asking).text == "ok"


async def test_a_proxy_is_asked_in_the_servers_place() -> None:
    seen: list[bytes] = []

    async def proxy(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request.split(b"\r\n")[0])
        writer.write(OK)

    async with server(proxy) as address, client(proxy=address) as http:
        assert (await http.get("http://nowhere.invalid/path")).text == "ok"
    assert seen == [b"GET http://nowhere.invalid/path HTTP/1.1"]


async def test_a_request_that_is_cancelled_leaves_room_for_others() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/slow" in request:
            await asyncio.sleep(30)
        writer.write(OK)

    async with server(answer) as url, client(connections=1) as http:
        slow = asyncio.create_task(http.get(f"{url}/slow"))
        await asyncio.sleep(0.1)
        slow.cancel()
        assert (await http.get(url)).text == "ok"
        with pytest.raises(asyncio.CancelledError):
            await slow


FORGOTTEN = """
import asyncio, sys
import httpx
from tools.transport import AiohttpTransport

transport = None

async def ask(url):
    global transport
    transport = AiohttpTransport(connections=2, keepalive_s=2.0)
    print((await httpx.AsyncClient(transport=transport).get(url)).text)

for _ in range(2):
    asyncio.run(ask(sys.argv[1]))
"""


async def test_connections_of_a_loop_that_is_gone_are_let_go_in_silence() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async with server(answer) as url:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", FORGOTTEN, url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.stdout, done.stderr) == ("ok\nok\n", "")
