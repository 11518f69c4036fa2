"""`turntrace serve search`: Search-R1's /retrieve over a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent.errors import AgentError


def serve_search(
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="JSONL, indexed first where that is to do; default: 10,033 Wikipedia leads."
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="A folder that `turntrace index` made, instead of a corpus.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """Search-R1's /retrieve, by BM25. Prints its port, ends on Ctrl-C or SIGTERM."""
    if corpus is not None and index is not None:
        raise AgentError("--corpus and --index both say what to search; give one of them")
    from agent.commands.index import with_progress
    from tools.servers.process import end_quietly_on_signals
    from tools.servers.search.index import index_of
    from tools.servers.search.server import serve

    end_quietly_on_signals()
    folder = index or with_progress(
        f"indexing {corpus or 'the Wikipedia leads'}", lambda tell: index_of(corpus, tell)
    )
    try:
        serve(folder, host, port)
    except OSError as error:
        raise AgentError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
