"""`turntrace gateway`: its options. The work is in `gateway_work.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.options import SetOption, refuse_force_alone
from agent.errors import AgentError


def gateway(
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    config: Annotated[
        Path | None, typer.Argument(help="config.yaml. Default: the embedded model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other than loopback needs --admin-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8900,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="TURNTRACE_ADMIN_KEY", help="The key that opens and ends sessions."),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Any API key is a session of its own.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: continue even if the config changed.")
    ] = False,
    workers: Annotated[int | None, typer.Option("--workers", hidden=True)] = None,
    set_: SetOption = None,
) -> None:
    """Serve OpenAI's and Anthropic's APIs to agent programs, and record every session.

    POST /sessions opens a session and returns its API key; POST /sessions/ID/finish ends it. Ctrl-C
    or SIGTERM stops; sessions that did not end are kept for --resume.
    """
    refuse_force_alone(force, resume)
    if workers is not None:
        raise AgentError(
            "--workers: a gateway is one process, since it alone knows its keys; start a second "
            "one with its own --port and --out (`run --agent` takes --workers)"
        )
    from agent.config.config import load_config

    loaded = load_config(config, set_ or [])
    for notice in loaded.notices("gateway"):
        print(f"note: {notice}", file=sys.stderr)
    from rich.console import Console

    from agent.commands.gateway_work import GatewayRequest, serve_gateway

    request = GatewayRequest(loaded, out, host, port, admin_key, open_, resume, force, sys.argv[1:])
    raise typer.Exit(serve_gateway(request, Console()))
