"""The gateway's HTTP: routes, keys, held headers, keep-alives, and whether an answer arrived.

One event loop, the engine's own. aiohttp's low-level server, because it says when a connection is
lost, and how: a client that read a whole answer closes cleanly, one that left bytes unread resets.

Headers are held back until the answer is there, for `HELD_S` at most: so an engine's failure can
still be a 503, which every client retries. After that the answer has begun, and is kept open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from agent.gateway.anthropic import ANTHROPIC
from agent.gateway.chat import CHAT
from agent.gateway.collector import Collector
from agent.gateway.dialect import ApiDialect
from agent.gateway.health import LoopLag, health
from agent.gateway.request import MAX_BODY_BYTES, Refusal, TurnRequest, strict_json
from agent.gateway.responses import RESPONSES
from agent.gateway.session import GatewaySession, not_written
from agent.gateway.sessions import GatewaySessions
from agent.gateway.sessions_api import finish_request, open_request, opened
from conversations.errors import RunFolderError
from conversations.session import SessionTurn

logger = logging.getLogger(__name__)

HELD_S = 50.0
KEEP_ALIVE_S = 10.0
JSON, EVENTS = "application/json", "text/event-stream"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

TURNS: Mapping[str, ApiDialect] = {
    "/chat/completions": CHAT,
    "/messages": ANTHROPIC,
    "/responses": RESPONSES,
}
"""The routes of turns, without `/v1` and `/s/{session}`."""
COUNT_TOKENS = "/messages/count_tokens"

HINTS = (
    *("user-agent", "x-session-id", "x-parent-session-id", "x-claude-code-session-id"),
    *("x-claude-code-agent-id", "session-id", "session_id", "thread-id", "x-app", "originator"),
    *("anthropic-beta", "anthropic-version", "x-stainless-lang"),
)
"""Headers that say which part of a program asks; they are recorded, and decide nothing."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: `admin_key` opens and ends sessions; None where only this machine can reach us.

    `needs_key`: a session's name in the path is not enough.
    """

    admin_key: str | None = None
    needs_key: bool = False


@dataclass(slots=True)
class GatewayServer:
    """Serves `sessions` on `host`:`port`; `url` says where. Use `start` and `stop`."""

    sessions: GatewaySessions
    model: str
    access: Access = field(default_factory=Access)
    held_s: float = HELD_S
    keep_alive_s: float = KEEP_ALIVE_S
    url: str = ""
    lag: LoopLag = field(default_factory=LoopLag)
    _collector: Collector | None = None
    _runner: web.ServerRunner | None = None
    _sent: dict[Any, _Delivery] = field(default_factory=dict)

    # ------------------------------------------------------------------ its life

    async def start(self, host: str, port: int) -> None:
        """Listens. Raises OSError if it cannot."""
        server = _Server(self._handle, handler_cancellation=True, access_log=None)
        server.sent = self._sent
        self._runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=5.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        try:
            await site.start()
        except BaseException:
            await self._runner.cleanup()
            raise
        taken = self._runner.addresses[0][1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{taken}"
        self.lag.start()
        self._collector = Collector(self.sessions.is_sampling)
        self._collector.start()

    async def listen_on(self, path: str) -> None:
        """Listens on a unix socket too, for programs that have no network."""
        if self._runner is None:
            raise RuntimeError("the server is not started")
        await web.UnixSite(self._runner, path, backlog=1024).start()

    async def stop(self) -> None:
        """Takes no more connections and closes those that are open. Safe to call twice."""
        runner, self._runner = self._runner, None
        self.lag.stop()
        if self._collector:
            self._collector.stop()
        if runner:
            await runner.cleanup()

    # ------------------------------------------------------------------ a request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request. Whatever happens is told in the dialect's form."""
        route, name = _route(request.path)
        dialect = ANTHROPIC if route.startswith("/messages") else TURNS.get(route, CHAT)
        self._sent.pop(request.protocol, None)  # who asks again has read the last answer
        try:
            if "origin" in request.headers:
                raise Refusal("a web page may not use the gateway", status=403, code="forbidden")
            if request.method == "POST" and route in TURNS:
                return await self._turn(request, dialect, self._session(request, name))
            return await self._other(request, route, name)
        except Refusal as refusal:
            return _refused(refusal, dialect)
        except RunFolderError as error:  # a full disk
            return _refused(not_written(error), dialect)
        except OSError as error:  # the connection broke: nobody is there to be told
            raise asyncio.CancelledError from error
        except Exception:
            logger.exception("the gateway failed to answer %s %s", request.method, request.path)
            return _refused(_FAILED, dialect)

    async def _other(
        self, request: web.BaseRequest, route: str, name: str | None
    ) -> web.StreamResponse:
        if request.method in ("GET", "HEAD"):
            if route in ("/", "/health", ""):
                return _json(health(self.sessions, self.lag))
            if route == "/models" or route.startswith("/models/"):
                return _json(self._models(route.removeprefix("/models").strip("/")))
        if request.method == "POST" and route == COUNT_TOKENS:
            session = self._session(request, name)
            asked = ANTHROPIC.read(await _body(request))
            place = await session.match(await session.with_images(asked))
            return _json({"input_tokens": place.prompt_length})
        if route == "/sessions" or route.startswith("/sessions/"):
            return await self._admin(request, route)
        raise Refusal(
            f"there is no {request.method} {request.path}; turns are POST /v1/chat/completions, "
            "/v1/messages and /v1/responses",
            status=404,
            code="not_found",
        )

    def _models(self, name: str) -> dict[str, Any]:
        """Any name is the model; one dict for all dialects."""
        length = self.sessions.runtime.settings.max_model_len
        entry = {
            "id": name or self.model,
            "object": "model",
            "type": "model",
            "display_name": name or self.model,
            "created": 0,
            "created_at": "1970-01-01T00:00:00Z",
            "owned_by": "turntrace",
            "max_model_len": length,
            "context_window": length,
        }
        if name:
            return entry
        ends = {"first_id": entry["id"], "last_id": entry["id"], "has_more": False}
        return {"object": "list", "data": [entry], **ends}

    # ------------------------------------------------------------------ who asks

    def _session(self, request: web.BaseRequest, name: str | None) -> GatewaySession:
        """The session of the key, else of the path. Raises Refusal."""
        session = self.sessions.of_key(_key(request))
        if session is None and name is not None and not self.access.needs_key:
            session = self.sessions.named(name)
        if session is None:
            raise Refusal(
                "the API key belongs to no session; POST /sessions makes one",
                status=401,
                code="invalid_api_key",
            )
        return session

    async def _admin(self, request: web.BaseRequest, route: str) -> web.StreamResponse:
        if self.access.admin_key is not None:
            given = (_key(request) or "").encode(errors="replace")
            if not hmac.compare_digest(given, self.access.admin_key.encode()):
                raise Refusal("the admin key is missing or wrong", status=401, code="unauthorized")
        parts = route.strip("/").split("/")
        if request.method == "POST" and parts == ["sessions"]:
            asked = open_request(await _body(request))
            session, key = self.sessions.open(asked.task(), asked.sample)
            return _json(opened(session, key, self.url))
        if request.method == "POST" and len(parts) == 3 and parts[2] == "finish":
            outcome = finish_request(await _body(request))
            finished = await self.sessions.finish(self.sessions.named(parts[1]), outcome)
            return web.Response(text=finished.line, content_type=JSON)
        if request.method == "DELETE" and len(parts) == 2:
            await self.sessions.abort(self.sessions.named(parts[1]))
            return _json({"id": parts[1], "aborted": True})
        raise Refusal(f"there is no {request.method} {request.path}", status=404, code="not_found")

    # ------------------------------------------------------------------ a turn

    async def _turn(
        self, request: web.BaseRequest, dialect: ApiDialect, session: GatewaySession
    ) -> web.StreamResponse:
        asked = session.bodies.read(dialect, await _body(request))
        _check_json(asked, session)
        client = {name: request.headers[name] for name in HINTS if name in request.headers}
        asked = await session.with_images(asked)
        is_retry = request.headers.get("x-stainless-retry-count", "0") not in ("0", "")
        answering = await session.begin(asked, dialect, client, is_retry=is_retry)
        answering.join()
        delivery = _Delivery(session, answering.task)
        try:
            reply = await self._reply(request, dialect, asked, delivery).send()
            self._watch(request, delivery)
            return reply
        except BaseException:
            delivery.lost()
            raise
        finally:
            answering.leave()

    def _reply(
        self,
        request: web.BaseRequest,
        dialect: ApiDialect,
        asked: TurnRequest,
        delivery: _Delivery,
    ) -> _Reply:
        return _Reply(request, dialect, asked, delivery, self.held_s, self.keep_alive_s)

    def _watch(self, request: web.BaseRequest, delivery: _Delivery) -> None:
        """All bytes are written. From now on the connection tells whether they were read."""
        transport = request.transport
        if transport is None or transport.is_closing():
            delivery.lost()
        else:
            delivery.arrived()
            self._sent[request.protocol] = delivery


@dataclass(slots=True)
class _Delivery:
    """Whether the answer of a turn reached its client; `lost` says that it did not."""

    session: GatewaySession
    task: asyncio.Task[SessionTurn]

    @property
    def turn(self) -> SessionTurn | None:
        """The turn, if there is one."""
        task = self.task
        if not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()

    def lost(self) -> None:
        if turn := self.turn:
            self.session.not_delivered(turn)

    def arrived(self) -> None:
        self.session.delivery.arrived(self.turn)


@dataclass(slots=True)
class _Reply:
    """The answer to one request for a turn."""

    request: web.BaseRequest
    dialect: ApiDialect
    asked: TurnRequest
    delivery: _Delivery
    held_s: float
    keep_alive_s: float

    async def send(self) -> web.StreamResponse:
        """Sends the turn, or raises Refusal if nothing was sent yet."""
        task = self.delivery.task
        await asyncio.wait((task,), timeout=self.held_s)
        if task.done():
            return await self._send_whole(self._body())
        return await self._send_slowly()

    def _body(self) -> bytes:
        """The answer. Raises Refusal."""
        task = self.delivery.task
        if task.cancelled():
            raise self.delivery.session.closed or Refusal(
                "the turn was given up", status=503, code="given_up", retry_after_s=1
            )
        answer = self.delivery.session.answer(task.result())
        write = self.dialect.stream if self.asked.stream else self.dialect.whole
        return write(answer, self.asked)

    async def _send_whole(self, body: bytes) -> web.StreamResponse:
        response = web.Response(body=body, headers=self._headers())
        await response.prepare(self.request)
        await response.write_eof()
        return response

    async def _send_slowly(self) -> web.StreamResponse:
        """Begins the answer and keeps it open until the turn is there."""
        task = self.delivery.task
        response = web.StreamResponse(headers=self._headers())
        await response.prepare(self.request)
        beat = self.dialect.keep_alive if self.asked.stream else b"\n"
        while not task.done():
            await response.write(beat)
            await asyncio.wait((task,), timeout=self.keep_alive_s)
        try:
            await response.write(self._body())
        except Refusal as refusal:
            if not self.asked.stream:  # a 200 has begun: only a broken connection says failure
                self._break_connection()
                raise ConnectionResetError from refusal
            await response.write(self.dialect.error_event(refusal))
        await response.write_eof()
        return response

    def _headers(self) -> dict[str, str]:
        kind = EVENTS if self.asked.stream else JSON
        return {"content-type": kind, "cache-control": "no-cache"}

    def _break_connection(self) -> None:
        if self.request.transport:
            self.request.transport.abort()


class _Server(web.Server):
    """aiohttp's server, which also tells the last answer of a connection that it broke."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent: dict[Any, _Delivery] = {}

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        """A reset, unlike a clean end, means that the client left bytes of the answer unread."""
        delivery = self.sent.pop(handler, None)
        if delivery and exc is not None:
            delivery.lost()
        super().connection_lost(handler, exc)


# ---------------------------------------------------------------------- small things


_FAILED = Refusal("the gateway failed; its log says why", status=500, code="internal_error")


def _route(path: str) -> tuple[str, str | None]:
    """The path without session and version, and the name of the session in it."""
    name = None
    if path.startswith("/s/"):
        name, _, rest = path[3:].partition("/")
        path = f"/{rest}"
    if path == "/v1" or path.startswith("/v1/"):
        path = path[3:] or "/"
    return path.rstrip("/") or "/", name


def _key(request: web.BaseRequest) -> str | None:
    given = request.headers.get("authorization", "")
    scheme, _, key = given.partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key") or None


async def _body(request: web.BaseRequest) -> bytes:
    """The body. Raises Refusal if it is larger than `MAX_BODY_BYTES`."""
    too_large = Refusal(
        f"the body is larger than {MAX_BODY_BYTES >> 20} MB", status=413, code="request_too_large"
    )
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    with contextlib.suppress(asyncio.IncompleteReadError):
        async for part in request.content.iter_any():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise too_large
            parts.append(part)
    return b"".join(parts)


def _check_json(asked: TurnRequest, session: GatewaySession) -> None:
    """Raises Refusal if the journal could not hold the request: it is written after the sampling.

    The messages are texts and images' hashes alone. The tools of an earlier turn need no second
    look.
    """
    strict_json(asked.asked)
    if not session.tree.knows_tools(asked.tools):
        strict_json(asked.tools)


def _json(value: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=JSON)


def _refused(refusal: Refusal, dialect: ApiDialect) -> web.Response:
    response = web.Response(body=dialect.error(refusal), status=refusal.status, content_type=JSON)
    if refusal.retry_after_s is not None:
        response.headers["retry-after"] = str(refusal.retry_after_s)
    if refusal.status == 413:
        response.force_close()
    return response
