"""`turntrace serve`: the embedded tool backends as servers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from agent.errors import AgentError

serve_app = typer.Typer(help="Serve an embedded tool backend.", no_args_is_help=True)

HostOption = Annotated[str, typer.Option(help="Address to listen on.")]


@serve_app.command("sandbox")
def sandbox(
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Programs at a time. Default: one a CPU.")
    ] = None,
    packages: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Installed packages that programs may import: numpy,sympy"
        ),
    ] = "",
    sessions: Annotated[
        int, typer.Option(min=0, help="Python sessions at a time, at most.")
    ] = 1024,
    session_idle_s: Annotated[
        float, typer.Option(min=1, help="Seconds without a call after which a session ends.")
    ] = 900,
    cold: Annotated[
        bool, typer.Option("--cold", help="Start a bubblewrap for each program (slower).")
    ] = False,
) -> None:
    """Serve SandboxFusion's /run_code, isolated by bubblewrap.

    Prints its port. Ctrl-C or SIGTERM stops it.
    """
    from tools.servers.sandbox.server import Options, package_names, run_sandbox_server

    options = Options(host, port, workers, package_names(packages), sessions, session_idle_s, cold)
    with _listening(host, port):
        run_sandbox_server(options)


@serve_app.command("search")
def search(
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="JSONL; it is indexed first if it has no index. Default: 10,033 Wikipedia leads."
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="A folder that `turntrace index` made, instead of a corpus.")
    ] = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """Serve Search-R1's /retrieve, by BM25.

    Prints its port. Ctrl-C or SIGTERM stops it.
    """
    if corpus is not None and index is not None:
        raise AgentError("--corpus and --index both say what to search; give one of them")
    from agent.commands.index import with_progress
    from tools.servers.process import end_quietly_on_signals
    from tools.servers.search.index import index_of
    from tools.servers.search.server import serve_index

    end_quietly_on_signals()
    folder = index or with_progress(
        f"indexing {corpus or 'the Wikipedia leads'}", lambda tell: index_of(corpus, tell)
    )
    with _listening(host, port):
        serve_index(folder, host, port)


@contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    """Raises AgentError if the server inside cannot listen there."""
    try:
        yield
    except OSError as error:
        raise AgentError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
