"""`turntrace view`: a run as a web page, written or served. The server is in `view_server.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.errors import AgentError

if TYPE_CHECKING:
    from conversations.run.open_run import Run


def view(
    run: Annotated[
        Path,
        typer.Argument(
            help="The run folder, or a folder of a trainer's steps or of rounds. With --serve also "
            "one of runs."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: RUN.html beside the run.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another run to compare with. Default: the parent that the run names."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Trajectories in the page. Default: 20000, or 256 MB of them."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="In a folder of steps or rounds: this task's trajectories by step."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it on 127.0.0.1 instead of writing it.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="With --serve. Default: 0, which takes a free one."),
    ] = None,
) -> None:
    """Look at a run in a browser: one page that opens from disk, or a local server."""
    if not serve:
        if port is not None:
            raise AgentError("--port needs --serve: without it a page is written and none served")
        if not _write_steps(run, out, task):
            _write(run, out, against, limit)
        return
    if out is not None or limit is not None or task is not None:
        raise AgentError(
            "--serve writes no page, has no limit and leads to every task: leave out --out, "
            "--limit and --task, or --serve"
        )
    from agent.commands.view_server import serve_pages

    try:
        serve_pages(run, against, port or 0)
    except OSError as error:
        raise AgentError(
            f"cannot listen on 127.0.0.1:{port or 0}: {error.strerror}; choose another --port"
        ) from error


def _write_steps(path: Path, out: Path | None, task: str | None) -> bool:
    """Writes the page of a folder of steps. False if it is none, and no task was asked for."""
    from conversations.page import build
    from conversations.page.steps import TaskOverSteps, write_steps
    from conversations.steps import is_steps

    if task is None and not is_steps(path):
        return False
    name = path.resolve().name if task is None else f"{path.resolve().name}-{_file_name(task)}"
    target = out or _beside(path, name)
    if task is None:
        count, size = write_steps(path, target)
        print(f"{target}: {count} steps, {size / 1e6:.1f} MB")
        return True
    with build(TaskOverSteps(path, task)) as page:
        size = page.write(target)
    print(f"{target}: {page.shown} trajectories of {task}, {size / 1e6:.1f} MB")
    return True


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)[:80]


def _write(path: Path, out: Path | None, against: Path | None, limit: int | None) -> None:
    from conversations.page import LIMIT, MAX_BYTES, build
    from conversations.run.open_run import open_run

    run = open_run(path)
    target = out or _beside(run.path, run.path.resolve().name)
    bounds = {"limit": LIMIT, "max_bytes": MAX_BYTES} if limit is None else {"limit": limit}
    with build(run, against=_other(run, against), **bounds) as page:
        size = page.write(target)
    print(f"{target}: {page.shown} trajectories, {size / 1e6:.1f} MB")
    if page.shown < page.total:
        print(
            f"note: the run has {page.total}; --limit N writes more, --serve has no limit",
            file=sys.stderr,
        )


def _other(run: Run, against: Path | None) -> Run | None:
    from conversations.page import parent_of
    from conversations.run.open_run import open_run

    if against is not None:
        return open_run(against)
    parent = parent_of(run)
    if parent is None and (run.manifest.get("parent") or run.manifest.get("follows")):
        print(
            "note: its parent is missing or changed; --against RUN compares with any run",
            file=sys.stderr,
        )
    return parent


def _beside(folder: Path, name: str) -> Path:
    """The default page. Raises AgentError if a file is there that is not such a page."""
    from conversations.page.html import GENERATOR

    target = folder.resolve().parent / f"{name}.html"
    if target.exists() and f'content="{GENERATOR}"'.encode() not in _start(target):
        raise AgentError(f"{target} exists and is no page of turntrace; choose another --out")
    return target


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(1000)
    except OSError as error:
        raise AgentError(
            f"{file} cannot be read: {error.strerror}; choose another --out"
        ) from error
