"""`turntrace model` and `turntrace version`: where the model is, and what is installed."""

from __future__ import annotations

from typing import Annotated

import typer


def model(
    name: Annotated[
        str, typer.Argument(help="smollm2-tools, smollm2-base, or a cached Hugging Face id.")
    ] = "smollm2-tools",
) -> None:
    """Print the local folder of a model. An embedded model is built on first use."""
    from agent.model.base import resolve_model

    print(resolve_model(name))


def version() -> None:
    """Print the versions of the packages that a run depends on."""
    from agent.runs.manifest import versions

    for name, installed in versions().items():
        print(f"{name} {installed or 'not installed'}")
