"""The server of `turntrace view --serve`.

It serves a list of runs, a page for each, and the page's blocks on request; of a folder of a
trainer's steps, first the figures by step, and a page for each task. Invariant: it is read
only and serves only browsers on this machine. It listens on 127.0.0.1 and answers only to its own
name, so a page elsewhere that has rebound its name to 127.0.0.1 gets nothing. A run is looked up
among those listed; no path is taken from an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

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
from conversations.page.steps import Links, TaskOverSteps, steps_page
from conversations.run.open_run import open_run
from conversations.run.scores import SCORES
from conversations.run.store import RUN, TRAJECTORIES, read_manifest
from conversations.steps import is_steps, run_folders
from tools.servers.process import end_quietly_on_signals

HOST = "127.0.0.1"
MAX_PAGES = 3
"""Pages whose blocks are kept. One more page drops the oldest."""

PATIENCE_S = 2.0
"""How long a request waits for a page. After that, the browser is told to ask again."""

RUNS, TASK = "/steps/runs", "/steps/task"
"""Where the list of runs and a task's page are, in a folder of steps. No run's name has a slash."""
_TASK = "task/"
"""Begins a task's name among the cached pages; no run's name has a slash."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A page.

    The browser asks for its blocks by `version`; `stamp` says which state of the run's file it
    shows.
    """

    name: str
    stamp: tuple[int, ...]
    version: str
    page: Page


class PageCache:
    """The runs in a folder, or the run that the folder is, and their pages.

    Methods block: call them on a thread.

    Raises AgentError if there is no run.
    """

    def __init__(self, folder: Path, against: Path | None = None) -> None:
        self._folder = folder
        self._against = None if against is None else open_run(against)
        self._pages: list[CachedPage] = []
        self._building = threading.Lock()
        self._steps: tuple[tuple[int, ...], str] | None = None
        self.single = (folder / RUN).is_file()
        if not self.runs():
            raise AgentError(f"{folder} holds no run: there is no {RUN} in it, nor one level down")

    def runs(self) -> dict[str, Path]:
        """The run folders by name."""
        if self.single:
            return {self._folder.resolve().name: self._folder}
        try:
            return run_folders(self._folder)
        except OSError as error:
            raise AgentError(f"{self._folder} cannot be read: {error.strerror}") from error

    def page(self, name: str) -> CachedPage | None:
        """The page of a run as it is now; None if there is none. Raises ConversationsError."""
        path = self.runs().get(name)
        if path is None:
            return None

        def make() -> Page:
            run = open_run(path)
            return build(run, against=self._against or parent_of(run))

        with self._building:
            return self._kept(name, _stamp(path), make)

    def task(self, task_id: str) -> CachedPage:
        """The page of one task's trajectories by step.

        Raises RunFolderError if no step asked it.
        """
        with self._building:
            return self._kept(
                f"{_TASK}{task_id}",
                self._state(),
                lambda: build(TaskOverSteps(self._folder, task_id)),
            )

    def steps(self) -> str | None:
        """The page of the figures by step; None if the folder is none of steps."""
        with self._building:
            if not is_steps(self._folder):
                return None
            state = self._state()
            if self._steps is None or self._steps[0] != state:
                self._steps = (state, steps_page(self._folder, Links(RUNS, _task_address))[0])
            return self._steps[1]

    def _state(self) -> tuple[int, ...]:
        return tuple(number for path in self.runs().values() for number in _stamp(path))

    def _kept(self, name: str, stamp: tuple[int, ...], make: Callable[[], Page]) -> CachedPage:
        for cached in self._pages:
            if (cached.name, cached.stamp) == (name, stamp):
                return cached
        made = CachedPage(name, stamp, uuid.uuid4().hex, make())
        self._pages.append(made)
        for old in self._pages[:-MAX_PAGES]:
            old.page.blocks.close()
        self._pages = self._pages[-MAX_PAGES:]
        return made

    def block(self, name: str | None, number: int, version: str) -> bytes | None:
        """A block of a run's page, or for None of a task's, even if the run has changed since.

        None if it is no longer kept.
        """
        for cached in self._pages:
            if cached.version == version and (
                cached.name == name or (name is None and cached.name.startswith(_TASK))
            ):
                with contextlib.suppress(IndexError, ValueError):  # ValueError: dropped meanwhile
                    return cached.page.blocks.read(number)
        return None

    def close(self) -> None:
        for one in self._pages:
            one.page.blocks.close()


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes if the run's records or scores do."""
    stamp: list[int] = []
    for name in (TRAJECTORIES, SCORES):
        try:
            status = (path / name).stat()
        except OSError:
            stamp += (0, 0)
        else:
            stamp += (status.st_mtime_ns, status.st_size)
    return tuple(stamp)


def make_app(cache: PageCache) -> Starlette:
    """The server's app: `/`, `/NAME/`, `/NAME/blocks/NUMBER?v=VERSION`.

    Of a folder of steps also `/steps/runs`, `/steps/task?id=ID`, `/steps/blocks/NUMBER?v=VERSION`.
    """

    reading: dict[str, asyncio.Task[Any]] = {}  # a page may take longer than a browser waits

    async def read(name: str, shown: str, function: Callable[..., Any], *given: str) -> Any:
        """What the function returns, on a thread; a page that says to wait if that takes long."""
        task = reading.get(name) or asyncio.create_task(run_in_threadpool(function, *given))
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            reading[name] = task
            return _html(waiting(shown))
        reading.pop(name, None)
        return task.result()

    async def index(request: Request) -> Response:
        if cache.single:
            runs = await run_in_threadpool(cache.runs)
            return RedirectResponse(_address(next(iter(runs))))
        found = await read("", "steps", cache.steps)
        if isinstance(found, Response):
            return found
        return await runs_page(request) if found is None else _html(found)

    async def runs_page(request: Request) -> Response:
        runs = await run_in_threadpool(cache.runs)
        rows = [
            {"name": name, "address": _address(name), **_about(path)} for name, path in runs.items()
        ]
        return _html(listing(rows))

    async def show(request: Request) -> Response:
        name = request.path_params["name"]
        return _page(await read(name, name, cache.page, name))

    async def task(request: Request) -> Response:
        task_id = request.query_params.get("id", "")
        return _page(await read(f"{_TASK}{task_id}", task_id, cache.task, task_id))

    def _page(found: Any) -> Response:
        if isinstance(found, Response):
            return found
        if found is None:
            return _text(404, "there is no such run")
        return _html(found.page.served(found.version))

    async def block(request: Request) -> Response:
        params = request.path_params
        content = await run_in_threadpool(
            cache.block, params.get("name"), params["number"], request.query_params.get("v", "")
        )
        if content is None:
            return _text(409, "this page is no longer kept: load it again")
        return Response(content, media_type="text/plain", headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            Route(RUNS, runs_page),
            Route(TASK, task),
            Route("/steps/blocks/{number:int}", block),
            Route("/{name}/", show),
            Route("/{name}/blocks/{number:int}", block),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
        ],
        exception_handlers={ConversationsError: _refused, AgentError: _refused},
    )


async def _refused(request: Request, error: Exception) -> Response:
    return _text(500, str(error))


def _html(text: str) -> Response:
    return HTMLResponse(
        text,
        headers={
            **HEADERS,
            "Content-Security-Policy": f"{policy(served=True)}; frame-ancestors 'none'",
        },
    )


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status_code=status, headers=HEADERS)


def _address(name: str) -> str:
    return f"/{quote(name, safe='')}/"


def _task_address(task_id: str) -> str:
    return f"{TASK}?{urlencode({'id': task_id})}"


def _about(path: Path) -> dict[str, Any]:
    """What the list says about a run; {} if its run.json cannot be read."""
    try:
        manifest = read_manifest(path)
    except ConversationsError:
        return {}
    counts, model = manifest.get("counts"), manifest.get("model")
    about = {
        "created": manifest.get("created"),
        "model": model.get("path") if isinstance(model, dict) else None,
    }
    done = (
        {"done": counts.get("done"), "reward": counts.get("mean_reward")}
        if isinstance(counts, dict)
        else {}
    )
    return {key: str(value or "") for key, value in about.items()} | done


def serve_pages(folder: Path, against: Path | None, port: int) -> None:
    """Prints the address, serves until Ctrl-C or SIGTERM, then ends the process with code 0.

    Raises OSError for a port in use.
    """
    cache = PageCache(folder, against)
    end_quietly_on_signals()
    try:
        asyncio.run(_serve(make_app(cache), port))
    finally:
        cache.close()


async def _serve(app: Starlette, port: int) -> None:
    with socket.create_server((HOST, port)) as listener:
        print(f"http://{HOST}:{listener.getsockname()[1]}/  (Ctrl-C stops it)", flush=True)
        await uvicorn.Server(
            uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning")
        ).serve([listener])
