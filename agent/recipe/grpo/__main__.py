"""`python -m agent.recipe.grpo`: train, report. Heavy modules are imported where they are used."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from agent.errors import AgentError, ConfigError
from agent.recipe.app import run_app
from agent.recipe.grpo.settings import (
    GrpoSettings,
    Layout,
    Loop,
    Reward,
    engine_overrides,
    gpu_arguments,
)
from agent.runs.ending import exit_code

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train with verl 0.9.1's own GRPO trainer, through turntrace's agent loop, on one GPU.",
)
_DEFAULT = GrpoSettings()


@app.command("train")
def start_training(
    gsm8k: Annotated[Path, typer.Argument(help="JSONL in GSM8K's format: question, answer.")],
    out: Annotated[Path, typer.Option(help="The run's folder; give it again to go on.")],
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "smollm2-tools",
    steps: Annotated[int, typer.Option(min=1)] = _DEFAULT.steps,
    prompts: Annotated[int, typer.Option(min=1, help="Problems a step.")] = _DEFAULT.prompts,
    samples: Annotated[int, typer.Option(min=2, help="Samples a problem.")] = _DEFAULT.samples,
    lr: Annotated[float, typer.Option(help="The learning rate.")] = _DEFAULT.lr,
    held_out: Annotated[
        int, typer.Option(min=1, help="Problems asked before and after.")
    ] = _DEFAULT.held_out,
    test_every: Annotated[
        int, typer.Option(min=0, help="Steps after which they are asked, too.")
    ] = _DEFAULT.test_every,
    loop: Annotated[Loop, typer.Option(help="Who runs the conversations.")] = _DEFAULT.loop,
    reward: Annotated[Reward, typer.Option(help="Where rewards come from.")] = _DEFAULT.reward,
    failure_share: Annotated[
        float, typer.Option(min=0, max=1, help="Programs that the sandbox fails, on purpose.")
    ] = 0.0,
    save_every: Annotated[int, typer.Option(min=1)] = _DEFAULT.save_every,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of SGLang's. May be repeated."),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="An override of verl's config. May be repeated.")
    ] = None,
) -> None:
    """Start the trainer, or go on with the run in --out; then write report.md and curve.svg."""
    from agent.model.base import resolve_model
    from agent.recipe.grpo import trainer

    settings = GrpoSettings(
        steps=steps,
        prompts=prompts,
        samples=samples,
        lr=lr,
        held_out=held_out,
        test_every=test_every,
        loop=loop,
        reward=reward,
        failure_share=failure_share,
        save_every=save_every,
    )
    layout, found = Layout(out.resolve()), resolve_model(model)
    arguments = {**gpu_arguments(settings), **dict(map(_argument, engine or ()))}
    trainer.check_installed()
    trainer.lay_out(settings, layout, gsm8k, found)
    extra = [*engine_overrides(arguments), *(override or ())]
    typer.echo(f"the trainer's output: {layout.root / 'trainer.log'}")
    code = 0
    try:
        if not trainer.is_done(settings, layout):
            code = trainer.run_trainer(settings, layout, found, extra)
    except KeyboardInterrupt as interrupt:
        typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(exit_code(interrupt)) from None
    if code:
        raise AgentError(
            f"the trainer ended with {code}; its output is {layout.root / 'trainer.log'}; "
            "the same command goes on from the last checkpoint"
        )
    _report(layout)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A run's folder.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Another run, for the curve. May be repeated.")
    ] = None,
) -> None:
    """Write report.md and curve.svg from what a run has left so far."""
    _report(Layout(out.resolve()), [Layout(other.resolve()) for other in against or ()])


def _report(layout: Layout, others: list[Layout] | None = None) -> None:
    from agent.recipe.grpo import report as reporting

    read = {one.root: reporting.read_report(one) for one in (layout, *(others or ()))}
    text = reporting.steps_table(read[layout.root])
    defects = reporting.verified(layout)
    text += f"\nverify: {len(defects)} defects in the folders of steps\n"
    text += "".join(f"- {defect}\n" for defect in defects[:20])
    (layout.root / "report.md").write_text(text, encoding="utf-8")
    lines = {_name(root, read): found for root, found in read.items()}
    (layout.root / "curve.svg").write_text(reporting.curve(lines), encoding="utf-8")
    typer.echo(text)


def _name(root: Path, among: Collection[Path]) -> str:
    """A folder's name; its path if another folder has the same name."""
    return root.name if [one.name for one in among].count(root.name) == 1 else str(root)


def _argument(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    try:
        if name and given:
            return name, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise ConfigError(f"--engine {text}: expected NAME=VALUE, VALUE in YAML")


if __name__ == "__main__":
    sys.exit(run_app(app, "python -m agent.recipe.grpo"))
