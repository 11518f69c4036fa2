"""`turntrace tasks`: its options. The work is in `tasks_work.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

tasks_app = typer.Typer(help="Write a task file.", no_args_is_help=True)


@tasks_app.command("gsm_symbolic")
def gsm_symbolic(
    size: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed gives the same problems.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: gsm_symbolic-SIZE-SEED.jsonl")
    ] = None,
) -> None:
    """Generated grade-school problems with answers (reasoning-gym)."""
    from agent.commands.tasks_work import write_gsm_symbolic

    path = out or Path(f"gsm_symbolic-{size}-{seed}.jsonl")
    print(f"{write_gsm_symbolic(path, size, seed)} tasks written to {path}")


@tasks_app.command("diagrams")
def diagrams(
    size: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed draws the same diagrams.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: diagrams-SIZE-SEED.jsonl")
    ] = None,
) -> None:
    """Geometry problems with drawn diagrams and answers, for `--tools geo3k`."""
    from agent.commands.tasks_diagrams import diagram_rows
    from agent.commands.tasks_work import write_rows

    path = out or Path(f"diagrams-{size}-{seed}.jsonl")
    print(f"{write_rows(path, diagram_rows(size, seed))} tasks written to {path}")


@tasks_app.command("gsm8k")
def gsm8k(
    source: Annotated[
        Path, typer.Argument(help="GSM8K's own JSONL: question, and an answer ending in #### 42.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """GSM8K's problems as tasks."""
    from agent.commands.tasks_work import write_gsm8k

    print(f"{write_gsm8k(source, out)} tasks written to {out}")
