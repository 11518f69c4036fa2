"""HTTP under the MCP client: every JSON-RPC request gets an answer, an error if HTTP fails.

By itself the SDK's streamable HTTP ends the whole session over one POST that fails, and waits
forever for an answer that breaks off or is not JSON-RPC.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

HTTP_FAILED = -32050
"""The code of the errors made here; servers use other numbers."""

GOODBYE_S = 5.0
"""For the DELETE that ends a session; closing waits for it."""

_EVENT_ID = re.compile(rb"(^|\n)id:")


class AnsweringTransport(httpx.AsyncHTTPTransport):
    """A transport for the SDK's client. Answers must come with `accept-encoding: identity`."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            request.extensions["timeout"] = dict.fromkeys(
                ("connect", "read", "write", "pool"), GOODBYE_S
            )
        if request.method != "POST":
            return await super().handle_async_request(request)
        request_id = json.loads(await request.aread()).get("id")
        try:
            response = await super().handle_async_request(request)
            problem = None if request_id is None else await _completed(response, request_id)
        except httpx.TransportError as error:
            return _failed(request_id, f"{type(error).__name__}: {error}")
        if (
            response.status_code >= httpx.codes.BAD_REQUEST
            and response.status_code != httpx.codes.NOT_FOUND
        ):
            problem = f"HTTP {response.status_code} {response.reason_phrase}"
        if problem:
            await response.aclose()
            return _failed(request_id, problem)
        return response


async def _completed(response: httpx.Response, request_id: Any) -> str | None:
    """Makes sure that the body answers the request; returns the reason if it does not.

    The SDK handles a 404 itself.
    """
    if response.status_code >= httpx.codes.MULTIPLE_CHOICES:
        return None
    content_type = response.headers.get("content-type", "").lower()
    if content_type.startswith("text/event-stream") and isinstance(
        response.stream, httpx.AsyncByteStream
    ):
        response.stream = _Events(response.stream, request_id)
        return None
    try:
        answered = json.loads(await response.aread())
    except ValueError:
        answered = None
    return (
        None
        if isinstance(answered, dict) and "id" in answered
        else f"HTTP {response.status_code} without a JSON-RPC answer"
    )


class _Events(httpx.AsyncByteStream):
    """A stream of events that ends with an error if it ends before the answer.

    The SDK stops reading at the answer: if it sees the end, the answer did not come.
    """

    def __init__(self, inner: httpx.AsyncByteStream, request_id: Any) -> None:
        self._inner = inner
        self._request_id = request_id

    async def __aiter__(self) -> AsyncIterator[bytes]:
        resumable = False
        try:
            async for chunk in self._inner:
                resumable = resumable or _EVENT_ID.search(chunk) is not None
                yield chunk
            problem = "the answer ended before it was complete"
        except httpx.TransportError as error:
            resumable, problem = False, f"{type(error).__name__}: {error}"
        if not resumable:  # a stream with event ids is resumed by the SDK
            message = json.dumps(_error(self._request_id, problem)).encode()
            yield b"\n\nevent: message\ndata: " + message + b"\n\n"

    async def aclose(self) -> None:
        await self._inner.aclose()


def _failed(request_id: Any, problem: str) -> httpx.Response:
    if request_id is None:  # a notification is not answered
        return httpx.Response(httpx.codes.ACCEPTED)
    return httpx.Response(httpx.codes.OK, json=_error(request_id, problem))


def _error(request_id: Any, problem: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": HTTP_FAILED, "message": problem}}
