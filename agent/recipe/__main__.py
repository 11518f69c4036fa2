"""`python -m agent.recipe`: data, train, merge, evaluate, problems, rounds.

Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zipfile import BadZipFile

import typer

from agent.errors import AgentError
from agent.recipe.app import run_app
from agent.runs.ending import exit_code, sigterm_as_interrupt

if TYPE_CHECKING:
    from agent.recipe.train import TrainingProgress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make the tool-calling adapter: data, then training; evaluate says what it is worth. "
    "And rounds: training without a trainer.",
)

_TOOLS = Path(__file__).parents[2] / "tool_configs" / "gsm8k.yaml"
_ADAPTER = Path(__file__).parents[1] / "model" / "adapter"


class Preset(StrEnum):
    """`small`: within 15 minutes on two CPU cores. `full`: all of GSM8K and more, on a GPU.

    `start`: the protocol and little more, for training by rewards to start from.
    """

    small = "small"
    full = "full"
    start = "start"


class RoundsPreset(StrEnum):
    """`small`: three rounds of 8 x 4, on a CPU. `full`: of 1,024 x 8, on a GPU."""

    small = "small"
    full = "full"


@app.command()
def data(
    gsm8k: Annotated[
        Path,
        typer.Argument(
            help="JSONL in GSM8K's format: question, answer with <<annotations>>, last #### 42."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file of token ids to write.")] = Path(
        "runs/adapter/tokens.npz"
    ),
    preset: Annotated[Preset, typer.Option(help="How many conversations.")] = Preset.small,
    generated: Annotated[
        int | None,
        typer.Option(min=1, help="Generated problems, instead of the preset's number."),
    ] = None,
    tools: Annotated[Path, typer.Option(help="The tools that ship.")] = _TOOLS,
    seed: int = 1,
) -> None:
    """Build training conversations, as token ids with a loss mask."""
    from agent.model.base import base_model_dir
    from agent.recipe import data as recipe
    from agent.recipe.setups import shipped_tools

    renderer = recipe.ExampleRenderer(recipe.template_of(base_model_dir()), shipped_tools(tools))
    mix = recipe.MIXES[preset]
    mix = replace(mix, generated=generated or mix.generated)
    out.parent.mkdir(parents=True, exist_ok=True)
    count = recipe.write_examples(
        recipe.build_examples(recipe.read_gsm8k(gsm8k), renderer, mix, seed), out
    )
    typer.echo(f"{count} conversations in {out} ({out.stat().st_size / 1e6:.1f} MB)")


@app.command()
def train(
    tokens: Annotated[Path, typer.Argument(help="What `data` wrote.")] = Path(
        "runs/adapter/tokens.npz"
    ),
    out: Annotated[Path, typer.Option(help="The adapter's folder.")] = Path("runs/adapter"),
    preset: Annotated[
        Preset, typer.Option(help="Batch size, passes and time limit.")
    ] = Preset.small,
    lr: Annotated[float | None, typer.Option(help="Another learning rate.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Another time limit; the schedule fits itself to it.")
    ] = None,
) -> None:
    """Train the adapter. Ctrl-C ends the training early and writes what there is."""
    from agent.model.base import base_model_dir
    from agent.recipe import train as recipe

    if not tokens.is_file():
        raise AgentError(
            f"{tokens} is not there; make it with: python -m agent.recipe data train.jsonl"
        )
    try:
        examples = recipe.TokenFile.read(tokens)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise AgentError(
            f"{tokens} is no file of token ids as `data` writes it: {error}"
        ) from error
    settings = recipe.SETTINGS[preset]
    settings = replace(
        settings, lr=lr or settings.lr, max_seconds=max_seconds or settings.max_seconds
    )
    result = recipe.train_adapter(base_model_dir(), examples, settings, out, _show)
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(
        f"\nadapter in {out}; held-out loss "
        f"{result['held_out_loss'].get('all', float('nan')):.4f}, {result['seconds']:.0f} s"
    )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="What `train` wrote.")],
    out: Annotated[Path, typer.Option(help="The model's folder, which must not exist.")],
) -> None:
    """Merge an adapter into the base model, for `rounds`, the GRPO recipe and `model_path`."""
    from agent.model import base

    if out.exists():
        raise AgentError(f"{out} exists; choose another --out")
    fresh = out.with_name(f"{out.name}.new")
    try:
        if fresh.is_dir():  # of a merge that was killed
            shutil.rmtree(fresh)
        base.write_merged(base.base_model_dir(), adapter, fresh)
        fresh.rename(out)
    except OSError as error:
        raise AgentError(
            f"{out} cannot be written: {error.strerror or error}; choose another --out"
        ) from error
    typer.echo(f"model in {out}")


@app.command("problems")
def write_problems(
    out: Annotated[Path, typer.Option(help="The JSONL file to write, in GSM8K's format.")],
    count: Annotated[int, typer.Option(min=1, help="Problems to draw.")] = 8_000,
) -> None:
    """Write generated problems that no adapter was trained on, for `rounds` and the GRPO recipe."""
    from agent.commands.tasks_work import write_rows
    from agent.recipe.practice import practice_rows

    typer.echo(f"{write_rows(out, practice_rows(count))} problems in {out}")


@app.command()
def evaluate(
    gsm8k: Annotated[
        Path,
        typer.Argument(
            help="GSM8K-format JSONL, the same that `data` read: its held-out rows are asked."
        ),
    ],
    adapter: Annotated[Path, typer.Option(help="The adapter to examine.")] = _ADAPTER,
    out: Annotated[Path, typer.Option(help="Folder for report.json and the engines' logs.")] = Path(
        "runs/adapter"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Problems of each kind.")] = 64,
) -> None:
    """Examine an adapter, and the base model beside it, on held-out problems.

    Ctrl-C ends early with what is done.
    """
    from rich.console import Console

    from agent.recipe.evaluate import Examination
    from agent.recipe.report import report_table

    out.mkdir(parents=True, exist_ok=True)
    rows = Examination(adapter, gsm8k, out, limit, Console()).run()
    Console(width=200).print(report_table(rows))
    typer.echo(f"report in {out / 'report.json'}")


@app.command()
def rounds(
    gsm8k: Annotated[Path, typer.Argument(help="JSONL in GSM8K's format: question, answer.")],
    out: Annotated[Path, typer.Option(help="The rounds' folder; give it again to go on.")],
    preset: Annotated[
        RoundsPreset,
        typer.Option(help="small: 3 rounds of 8 x 4, on a CPU. full: of 1,024 x 8."),
    ] = RoundsPreset.small,
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "smollm2-tools",
    count: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Problems a round.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples a problem.")] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Problems asked before and after each round.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A config key of every stage. Repeatable."),
    ] = None,
) -> None:
    """Sample, keep what is right, train on it, and again; report.md has each round's figures."""
    from rich.console import Console

    from agent.recipe import rounds as recipe

    plan = recipe.FULL_ROUNDS if preset is RoundsPreset.full else recipe.SMALL_ROUNDS
    plan = replace(
        plan,
        rounds=count or plan.rounds,
        tasks=tasks or plan.tasks,
        samples=samples or plan.samples,
        held_out=held_out or plan.held_out,
    )
    root = out.resolve()
    work = recipe.SelfTraining(plan, root, gsm8k, model, Console(), set_ or ())
    try:
        with sigterm_as_interrupt():
            results = work.run(lambda done: recipe.write_rounds(root, done))
    except KeyboardInterrupt as interrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(exit_code(interrupt)) from None
    typer.echo(recipe.rounds_table(results))
    typer.echo(f"report in {out / 'report.md'}")


def _show(progress: TrainingProgress) -> None:
    left = progress.elapsed_s * (1 / progress.share - 1) if progress.share > 0 else 0
    line = (
        f"step {progress.step}  {progress.share:4.0%}  loss {progress.loss:.3f}  lr "
        f"{progress.lr:.1e}  {progress.tokens_per_s:.0f} tok/s"
    )
    typer.echo(f"\r{line}  {left / 60:.1f} min left ", nl=False)


if __name__ == "__main__":
    sys.exit(run_app(app, "python -m agent.recipe"))
