"""`turntrace verify`: prints a line for each defect, then a summary."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.errors import AgentError
from agent.terminal import LiveLine

if TYPE_CHECKING:
    from rich.console import Console

    from agent.config.config import Config
    from agent.scoring.compare import Comparison
    from conversations.checks.finding import Defect
    from conversations.verify import Verdict


def verify(
    run: Annotated[Path, typer.Argument(help="The run folder. A run may still write to it.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: each defect, then the summary.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a CPU.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG|URL",
            help="Also let this engine score every sampled token again: config.yaml, or an SGLang "
            "server. Writes scores.jsonl into the run.",
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --engine: of the difference of log-probs, in nats. Default: 0.05, or 0.5 "
            "for an engine on this machine's CPU.",
        ),
    ] = None,
) -> None:
    """Prove a run folder: hashes, tokens against messages, the ledger, groups, counts.

    With --engine also the log-probs: at most 1% of the tokens may differ by more than --bound, none
    by more than 2 nats.

    Exit code 1 if anything is wrong.
    """
    from rich.console import Console

    from conversations.verify import verify_run

    if bound is not None and (engine is None or not math.isfinite(bound)):
        raise AgentError("--bound needs --engine, and a number of nats")
    console = Console(stderr=True)
    config = _engine_config(engine)

    read = total = 0

    def line() -> str:
        return f"{100 * read // max(total, 1):3d}% of {total / 1e6:.0f} MB"

    def show_progress(done: int, of: int) -> None:
        nonlocal read, total
        read, total = done, of
        progress.refresh()

    def show_defect(defect: Defect) -> None:
        progress.hide()
        print(json.dumps(defect.as_json()) if as_json else defect, flush=True)

    processes = jobs or len(os.sched_getaffinity(0))
    with LiveLine(console, line, plain_s=None) as progress:
        verdict = verify_run(run, jobs=processes, on_defect=show_defect, on_progress=show_progress)
    if not as_json:
        _print(verdict)
    comparison = _score(run, engine, config, bound, console)
    if as_json:
        scores = {} if comparison is None else {"scores": comparison.as_json()}
        print(json.dumps({**verdict.as_json(), **scores}))
    elif comparison is not None:
        from agent.commands.verify_work import show_comparison

        show_comparison(comparison)
    is_proven = not verdict.defects and (comparison is None or comparison.is_met)
    raise typer.Exit(0 if is_proven else 1)


def _print(verdict: Verdict) -> None:
    for note in verdict.notes:
        print(f"note: {note}")
    print(verdict, flush=True)


def _engine_config(engine: str | None) -> Config | None:
    """The config of `--engine`. A mistake in it is told before the run is read."""
    if engine is None:
        return None
    from agent.commands.verify_work import engine_config

    return engine_config(engine)


def _score(
    run: Path, engine: str | None, config: Config | None, bound: float | None, console: Console
) -> Comparison | None:
    if engine is None or config is None:
        return None
    from agent.commands.verify_work import verify_engine

    return verify_engine(run, engine, config, bound, console)
