"""`turntrace index`: a corpus made searchable, once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

T = TypeVar("T")


def index(
    corpus: Annotated[
        Path, typer.Argument(help="JSONL: id and contents a line, or id, title and text.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to write; default: where `corpus:` of a tool config looks, in the cache."
        ),
    ] = None,
) -> None:
    """Make a corpus searchable; an index that is still true of it is left as it is."""
    from tools.servers.search.index import build_index, default_folder, find_corpus, read_manifest

    folder = out or default_folder(corpus)
    started = time.monotonic()
    made = with_progress(
        f"indexing {corpus}", lambda tell: build_index(find_corpus(corpus), folder, tell)
    )
    documents = read_manifest(folder)["documents"]
    if not made:
        print(f"nothing to do: {folder} holds the {documents} documents of {corpus}")
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{documents} documents indexed in {time.monotonic() - started:.1f} s: {folder} ({size / 2**20:.1f} MiB)"
    )


def with_progress(what: str, work: Callable[[Callable[[float], None]], T]) -> T:
    """What the work returns, done below a progress bar, on stderr and where somebody looks; a fast one never shows it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(what, total=1.0)
        return work(lambda done: bar.update(task, completed=done))
