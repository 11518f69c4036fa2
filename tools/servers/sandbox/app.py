"""The sandbox server's routes: SandboxFusion's, with the real server's answers, and our own.

    POST /run_code, GET /v1/ping            SandboxFusion's
    GET /v1/info                            what this server can do and how well it isolates
    POST /v1/sessions                       starts a Python session: {"id": ...}
    POST /v1/sessions/{id}/run_code         runs code in it
    DELETE /v1/sessions/{id}                ends it

As many programs run at a time as there are workers. The others wait in order of arrival; waiting
does not count against their time limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pydantic
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tools.servers.sandbox.memory import MIB
from tools.servers.sandbox.probe import Working
from tools.servers.sandbox.program import SandboxError
from tools.servers.sandbox.runner import memory_mib, result, run_code
from tools.servers.sandbox.sessions import Sessions, TooManySessions
from tools.servers.sandbox.wire import (
    RunCodeRequest,
    RunCodeResponse,
    SessionCode,
    SessionRequest,
    SessionResponse,
)

MAX_REQUEST_BYTES = 64 * MIB

_Model = TypeVar("_Model", bound=pydantic.BaseModel)


def sandbox_app(
    working: Working, sessions: Sessions, workers: int, stopping: asyncio.Event
) -> Starlette:
    """The ASGI app. Runs at most `workers` programs at a time; ends them if `stopping` is set."""
    turn = asyncio.Semaphore(workers)

    async def in_turn(running: Callable[[], Awaitable[Response]]) -> Response:
        async with turn:
            return await running()

    async def unless_left(request: Request, running: Callable[[], Awaitable[Response]]) -> Response:
        return await _unless(in_turn(running), _hung_up(request), stopping.wait()) or _refusal(
            503, "stopped", [], "the server is being stopped"
        )

    async def run(request: Request) -> Response:
        body = await _parsed_body(request, RunCodeRequest)
        if isinstance(body, Response):
            return body
        language = working.languages.get(body.language)
        if language is None:
            supported = ", ".join(working.languages)
            return _refusal(
                422,
                "enum",
                ["body", "language"],
                f"{body.language!r} is not supported here; supported are {supported}",
            )

        async def running() -> Response:
            return _json(await run_code(working.sandbox, language, body))

        return await unless_left(request, running)

    async def start_session(request: Request) -> Response:
        body = await _parsed_body(request, SessionRequest)
        if isinstance(body, Response):
            return body
        try:
            name = await sessions.start(memory_mib(body.memory_limit_MB))
        except TooManySessions as error:
            return _refusal(429, "too_many", [], str(error))
        except (SandboxError, OSError) as error:
            return _refusal(500, "sandbox_error", [], str(error))
        if await request.is_disconnected():  # the client never learns the id
            await sessions.end(name)
        return JSONResponse({"id": name}, 201)

    async def run_in_session(request: Request) -> Response:
        body = await _parsed_body(request, SessionCode)
        if isinstance(body, Response):
            return body

        async def running() -> Response:
            return await _run_in_session(sessions, request.path_params["id"], body)

        return await unless_left(request, running)

    async def end_session(request: Request) -> Response:
        return (
            Response(status_code=204)
            if await sessions.end(request.path_params["id"])
            else _unknown_session()
        )

    async def ping(_: Request) -> Response:
        return JSONResponse("pong")

    async def info(_: Request) -> Response:
        return JSONResponse(
            {
                "server": "turntrace",
                "languages": list(working.languages),
                "packages": list(working.packages),
                "sessions": True,
                "start": "warm" if working.is_warm else "cold",
                "memory_in_sum": str(working.sandbox.groups),
                "workers": workers,
                "notes": list(working.notes),
            }
        )

    return Starlette(
        routes=[
            Route("/run_code", run, methods=["POST"]),
            Route("/v1/ping", ping),
            Route("/v1/info", info),
            Route("/v1/sessions", start_session, methods=["POST"]),
            Route("/v1/sessions/{id}/run_code", run_in_session, methods=["POST"]),
            Route("/v1/sessions/{id}", end_session, methods=["DELETE"]),
        ]
    )


async def _run_in_session(sessions: Sessions, name: str, body: SessionCode) -> Response:
    try:
        called = await sessions.run(name, body.code, body.stdin or "", body.run_timeout)
    except (SandboxError, OSError) as error:
        return _json(SessionResponse(status="SandboxError", message=str(error), session_ended=True))
    if called is None:
        return _unknown_session()
    ran = result(called.outcome, called.memory_mib)
    return _json(
        SessionResponse(
            status="Success" if ran.return_code == 0 else "Failed",
            run_result=ran,
            session_ended=called.is_over,
        )
    )


def _unknown_session() -> Response:
    return _refusal(
        404,
        "no_session",
        ["path", "id"],
        "there is no such session: it has ended, or never existed",
    )


async def _parsed_body(request: Request, model: type[_Model]) -> _Model | Response:
    """The request's body, or the answer if it cannot be served."""
    try:
        body = await _body(request)
    except ClientDisconnect:
        return Response(status_code=400)  # the client is gone
    if body is None:
        return _refusal(413, "too_large", [], f"the request is over {MAX_REQUEST_BYTES // MIB} MiB")
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        problems: Any = error.errors(include_url=False, include_context=False, include_input=False)
        return JSONResponse(
            {"detail": [{**wrong, "loc": ["body", *wrong["loc"]]} for wrong in problems]}, 422
        )


async def _body(request: Request) -> bytes | None:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            return None
    return bytes(body)


def _json(answer: RunCodeResponse) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _refusal(code: int, kind: str, where: list[str], message: str) -> Response:
    return JSONResponse({"detail": [{"type": kind, "loc": where, "msg": message}]}, code)


async def _unless(
    running: Coroutine[Any, Any, Response], *ends: Coroutine[Any, Any, Any]
) -> Response | None:
    """The result, or None if one of `ends` comes first; `running` is then cancelled."""
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(coroutine) for coroutine in (running, *ends)
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
