"""`turntrace index`: makes a corpus searchable."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from agent.terminal import LiveLine

T = TypeVar("T")


def index(
    corpus: Annotated[
        Path,
        typer.Argument(help="JSONL; each line has id and contents, or id, title and text."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: where `corpus:` of a tool config looks."),
    ] = None,
) -> None:
    """Make a corpus searchable. An index that is up to date stays as it is."""
    from tools.servers.search.index import (
        build_index,
        default_folder,
        find_corpus,
        read_index_manifest,
    )

    folder = out or default_folder(corpus)
    started = time.monotonic()
    made = with_progress(
        f"indexing {corpus}", lambda tell: build_index(find_corpus(corpus), folder, tell)
    )
    documents = read_index_manifest(folder)["documents"]
    if not made:
        print(f"nothing to do: {folder} holds the {documents} documents of {corpus}")
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{documents} documents indexed in {time.monotonic() - started:.1f} s: "
        f"{folder} ({size / 2**20:.1f} MiB)"
    )


def with_progress(what: str, work: Callable[[Callable[[float], None]], T]) -> T:
    """Runs `work` and shows on stderr how much of it is done; it reports a share from 0 to 1."""
    from rich.console import Console

    share = 0.0

    def report(done: float) -> None:
        nonlocal share
        share = done
        progress.refresh()

    with LiveLine(
        Console(stderr=True), lambda: f"{what}: {100 * share:.0f}%", plain_s=None
    ) as progress:
        return work(report)
