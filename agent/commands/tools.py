"""`turntrace tools`: its options. The work is in `tools_work.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agent.config.config import Config

tools_app = typer.Typer(help="Check a tool config, call a tool by hand.", no_args_is_help=True)

FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="tools.yaml, or the name of a shipped one: gsm8k, geo3k, search, sandbox, image_zoom, "
        "mcp, all.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="The model whose chat template and tokens to use: smollm2-tools, a folder."
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="config.yaml, for its model and limits.")
]


@tools_app.command("check")
def check(
    file: FileArgument,
    model: ModelOption = None,
    config: ConfigOption = None,
    no_start: Annotated[
        bool,
        typer.Option(
            "--no-start", help="Start no backend, except MCP servers: they say what they offer."
        ),
    ] = False,
) -> None:
    """Load a tool config, start its backends, show each tool as the model sees it.

    Exit code 1 if one does not start.
    """
    from agent.commands import tools_work

    raise typer.Exit(tools_work.check_file(file, _config(config, model), start=not no_start))


@tools_app.command("call")
def call(
    file: FileArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tool.")],
    arguments: Annotated[str, typer.Argument(metavar="ARGUMENTS", help="A JSON object.")] = "{}",
    ground_truth: Annotated[
        str | None,
        typer.Option("--ground-truth", help="The task's ground truth, for tools that grade."),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
) -> None:
    """Call a tool once, as a run does. Exit code 1 if its status is not ok.

    With a model, a long answer is cut as in a run.
    """
    from agent.commands import tools_work

    raise typer.Exit(
        tools_work.call_tool(file, name, arguments, ground_truth, _config(config, model))
    )


def _config(path: Path | None, model: str | None) -> Config | None:
    """None if neither is given: then no tokenizer is loaded."""
    if path is None and model is None:
        return None
    from agent.config.config import load_config

    return load_config(path, [f"model_path={json.dumps(model)}"] if model else [])
