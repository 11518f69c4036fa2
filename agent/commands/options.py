"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent.errors import AgentError

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="config.yaml. Default: the embedded model.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config key: rollout.temperature=0.7"
    ),
]


def refuse_force_alone(force: bool, resume: bool) -> None:
    """Raises AgentError for --force without --resume, which would do nothing."""
    if force and not resume:
        raise AgentError("--force: needs --resume; it never replaces a run that is there")
