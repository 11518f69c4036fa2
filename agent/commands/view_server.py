"""Runs served to a browser on this machine: a list of them, a page each, and the page's blocks when it asks for them.

Invariant: read only, and only for this machine's browser: it listens on 127.0.0.1, answers no name but its own (a page elsewhere that has
rebound its name to 127.0.0.1 gets nothing), and a run is looked up among those listed, never opened by a path out of an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from agent.errors import AgentError
from conversations.errors import ConversationsError
from conversations.page import Page, build, listing, parent_of, policy, waiting
from conversations.run.open_run import open_run
from conversations.run.store import RUN, TRAJECTORIES, read_manifest
from tools.servers.process import end_quietly_on_signals

HOST = "127.0.0.1"
KEPT = 3
"""Pages whose blocks can be asked for; one more drops the oldest."""

PATIENCE_S = 2.0
"""How long a request waits for a page to be made; after that, the browser is told to ask again."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Ready:
    """A page as it was made. Its `version` names it to the browser, `stamp` is what the run's file was then."""

    name: str
    stamp: tuple[int, int]
    version: str
    page: Page


class Shelf:
    """The runs of a folder, or the one run that it is, and the pages made of them. Its methods block; use a thread.

    Raises AgentError where there is no run.
    """

    def __init__(self, folder: Path, against: Path | None = None) -> None:
        self._folder = folder
        self._against = None if against is None else open_run(against)
        self._ready: list[Ready] = []
        self._building = threading.Lock()
        self.single = (folder / RUN).is_file()
        if not self.runs():
            raise AgentError(f"{folder} holds no run: there is no {RUN} in it, nor one level down")

    def runs(self) -> dict[str, Path]:
        """Folders of runs, by name."""
        if self.single:
            return {self._folder.resolve().name: self._folder}
        try:
            return {
                path.name: path for path in sorted(self._folder.iterdir()) if (path / RUN).is_file()
            }
        except OSError as error:
            raise AgentError(f"{self._folder} cannot be read: {error.strerror}") from error

    def page(self, name: str) -> Ready | None:
        """The page of a run as the run is now; None where there is no such run. Raises ConversationsError."""
        path = self.runs().get(name)
        if path is None:
            return None
        with self._building:
            stamp = _stamp(path)
            found = next(
                (one for one in self._ready if (one.name, one.stamp) == (name, stamp)), None
            )
            if found is None:
                run = open_run(path)
                found = Ready(
                    name,
                    stamp,
                    uuid.uuid4().hex,
                    build(run, against=self._against or parent_of(run)),
                )
                self._ready.append(found)
                for old in self._ready[:-KEPT]:
                    old.page.blocks.close()
                self._ready = self._ready[-KEPT:]
            return found

    def block(self, name: str, number: int, version: str) -> bytes | None:
        """A block of a page made earlier, whatever became of the run since; None where that is no longer kept."""
        found = next(
            (one for one in self._ready if (one.name, one.version) == (name, version)), None
        )
        with contextlib.suppress(IndexError, ValueError):  # ValueError: dropped in between
            return None if found is None else found.page.blocks.read(number)
        return None

    def close(self) -> None:
        for one in self._ready:
            one.page.blocks.close()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = (path / TRAJECTORIES).stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def make_app(shelf: Shelf) -> Starlette:
    """The server's app: `/`, `/NAME/`, `/NAME/blocks/NUMBER?v=VERSION`."""

    reading: dict[
        str, asyncio.Task[Ready | None]
    ] = {}  # a page may take longer than a browser waits

    async def index(request: Request) -> Response:
        runs = await run_in_threadpool(shelf.runs)
        if shelf.single:
            return RedirectResponse(_address(next(iter(runs))))
        rows = [
            {"name": name, "address": _address(name), **_about(path)} for name, path in runs.items()
        ]
        return _html(listing(rows))

    async def show(request: Request) -> Response:
        name = request.path_params["name"]
        task = reading.get(name) or asyncio.create_task(run_in_threadpool(shelf.page, name))
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            reading[name] = task
            return _html(waiting(name))
        reading.pop(name, None)
        found = task.result()
        return (
            _told(404, "there is no such run")
            if found is None
            else _html(found.page.served(found.version))
        )

    async def block(request: Request) -> Response:
        params = request.path_params
        found = await run_in_threadpool(
            shelf.block, params["name"], params["number"], request.query_params.get("v", "")
        )
        if found is None:
            return _told(409, "this page is no longer kept: load it again")
        return Response(found, media_type="text/plain", headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/{name}/", show),
            Route("/{name}/blocks/{number:int}", block),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
        ],
        exception_handlers={ConversationsError: _refused, AgentError: _refused},
    )


async def _refused(request: Request, error: Exception) -> Response:
    return _told(500, str(error))


def _html(text: str) -> Response:
    return HTMLResponse(
        text,
        headers={
            **HEADERS,
            "Content-Security-Policy": f"{policy(served=True)}; frame-ancestors 'none'",
        },
    )


def _told(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status_code=status, headers=HEADERS)


def _address(name: str) -> str:
    return f"/{quote(name, safe='')}/"


def _about(path: Path) -> dict[str, Any]:
    """What the list of runs says of one; nothing where its run.json cannot be read."""
    try:
        manifest = read_manifest(path)
    except ConversationsError:
        return {}
    counts, model = manifest.get("counts"), manifest.get("model")
    said = {
        "created": manifest.get("created"),
        "model": model.get("path") if isinstance(model, dict) else None,
    }
    done = (
        {"done": counts.get("done"), "reward": counts.get("mean_reward")}
        if isinstance(counts, dict)
        else {}
    )
    return {key: str(value or "") for key, value in said.items()} | done


def serve_until_ended(folder: Path, against: Path | None, port: int) -> None:
    """Serves until Ctrl-C or SIGTERM, then ends the process with code 0; prints the address first. Raises OSError for a port in use."""
    shelf = Shelf(folder, against)
    end_quietly_on_signals()
    try:
        asyncio.run(_serve(make_app(shelf), port))
    finally:
        shelf.close()


async def _serve(app: Starlette, port: int) -> None:
    with socket.create_server((HOST, port)) as listener:
        print(f"http://{HOST}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        await uvicorn.Server(
            uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning")
        ).serve([listener])
