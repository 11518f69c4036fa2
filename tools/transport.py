"""httpx over aiohttp's connections: a request's CPU does not grow with the number of others.

httpx's own pool looks at all its connections for each request: with 256 calls at once it takes 20
times the CPU of this one (`make bench`, http_call_cpu_ms).

The library httpx-aiohttp costs about the same CPU but does not fit. It reports a refused
connection, and one that broke during a call, as a ConnectTimeout, so that a call which may have run
looks like one that was never sent; it lets errors of aiohttp through, retries no connecting,
refuses a URL with a password, and warns about the connections of a closed event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp
import httpx
from yarl import URL

PAUSE_S = 0.5
"""The pause before the second retry; twice that before the third. None before the first."""


class AiohttpTransport(httpx.AsyncBaseTransport):
    """A transport that belongs to the event loop of its first request.

    connections: at a time; more requests wait their turn
    keepalive_s: after which idle connections are closed
    connect_retries: further attempts to connect; nothing else is tried again

    httpx's time-outs hold, except "write", which has no effect. Errors are httpx's.
    """

    def __init__(
        self,
        *,
        connections: int,
        keepalive_s: float,
        connect_retries: int = 0,
        context: ssl.SSLContext | None = None,
        proxy: str | None = None,
    ) -> None:
        self._connections = connections
        self._keepalive_s = keepalive_s
        self._connect_retries = connect_retries
        self._context = context
        self._proxy = proxy
        self._opened: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The response; its body is not read yet."""
        content = await request.aread()
        for retry in range(self._connect_retries):
            try:
                return await self._sent(request, content)
            except httpx.ConnectError:
                await asyncio.sleep(PAUSE_S * retry)
        return await self._sent(request, content)

    async def post(
        self,
        url: URL,
        content: bytes,
        headers: Mapping[str, str],
        *,
        connect_s: float,
        read_s: float,
    ) -> httpx.Response:
        """One POST past httpx's client, whose machinery takes more CPU than the rest of a request.

        The body is read. There is no retry, and no limit on the wait for a free connection. Raises
        httpx's errors.
        """
        with _httpx_errors():
            async with self._session().post(
                url,
                headers=headers,
                skip_auto_headers=("Accept-Encoding",),
                data=content,
                allow_redirects=False,
                proxy=self._proxy,
                timeout=aiohttp.ClientTimeout(sock_connect=connect_s, sock_read=read_s),
            ) as response:
                body = await response.read()
        return httpx.Response(response.status, headers=response.raw_headers, content=body)

    async def _sent(self, request: httpx.Request, content: bytes) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        # The user's name and password are in the headers.
        url = request.url.copy_with(userinfo=b"") if request.url.userinfo else request.url
        with _httpx_errors():
            response = await self._session().request(
                request.method,
                URL(str(url), encoded=True),
                headers=request.headers.multi_items(),
                skip_auto_headers=("Content-Type",),
                data=content or None,
                allow_redirects=False,
                proxy=self._proxy,
                timeout=aiohttp.ClientTimeout(
                    connect=timeout.get("pool"),
                    sock_connect=timeout.get("connect"),
                    sock_read=timeout.get("read"),
                ),
            )
        reason: dict[str, Any] = (
            {"reason_phrase": response.reason.encode("latin-1", "replace")}
            if response.reason
            else {}
        )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response),
            request=request,
            extensions=reason,
        )

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=_Connector(
                    limit=self._connections,
                    keepalive_timeout=self._keepalive_s,
                    ssl=True if self._context is None else self._context,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._opened

    async def aclose(self) -> None:
        """Closes the connections. Those of a closed loop are left to the garbage collector."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.close()

    def __del__(self) -> None:
        if self._opened is not None:
            self._opened.detach()  # otherwise it prints that it was not closed


class _Connector(aiohttp.TCPConnector):
    def __del__(self, *_: object) -> None:
        """Nothing: aiohttp's own prints a warning and closes connections on their event loop."""


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors():
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        self._response.release()


@contextlib.contextmanager
def _httpx_errors() -> Iterator[None]:
    """Raises aiohttp's errors as httpx's, the more specific first."""
    try:
        yield
    except aiohttp.SocketTimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ServerTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except (aiohttp.ClientHttpProxyError, aiohttp.ClientProxyConnectionError) as error:
        raise httpx.ProxyError(str(error)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error)) from error
    except aiohttp.ServerDisconnectedError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise httpx.ReadError(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
