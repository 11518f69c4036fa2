"""`turntrace run`: its options. The work is in `run_work.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.options import ConfigOption, SetOption, refuse_force_alone
from agent.errors import AgentError


def run(
    tasks: Annotated[
        Path, typer.Argument(help="JSONL or Parquet, in verl's schema or plain prompts.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    config: ConfigOption = None,
    tools: Annotated[
        str | None,
        typer.Option(
            help="tools.yaml, or a shipped one's name: gsm8k, geo3k, search, sandbox, image_zoom, "
            "mcp, all."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="Samples of each task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Run only the first N tasks.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="With --resume: continue even if config, tools, model or tasks changed."
        ),
    ] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Sample with val_kwargs.")] = False,
    stop_after: Annotated[
        float | None,
        typer.Option(
            min=0, help="Stop after N seconds. --resume continues the unfinished conversations."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Run the conversations in N processes on Ray, each with its own event loop, tools "
            "and engine, or its connections to the servers. Needs the extra ray.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="With --workers: host:port of a Ray cluster's head, or auto. Without it a Ray is "
            "started on this machine.",
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run a program for each sample, on a gateway: 'mini -m openai/m -t {prompt}'",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="With --agent: module:function or file.py:function, as for rescore."),
    ] = None,
    agent_sandbox: Annotated[
        bool,
        typer.Option("--agent-sandbox", help="With --agent: isolated; only the gateway answers."),
    ] = False,
    agent_mount: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="With --agent-sandbox: shown read-only. Repeatable."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Run every task to its end. Each trajectory is written as it finishes."""
    refuse_force_alone(force, resume)
    if ray is not None and workers is None:
        raise AgentError(
            f"--ray {ray}: give --workers N too, the number of processes to start there"
        )
    from agent.config.config import load_config

    overrides = [*(set_ or []), *_tools_override(tools), *_n_override(n, validate)]
    loaded = load_config(config, overrides)
    for notice in loaded.notices("run" if agent is None else "agent"):
        print(f"note: {notice}", file=sys.stderr)
    from rich.console import Console

    from agent.commands.run_work import RunRequest, run_request

    request = RunRequest(
        tasks,
        out,
        loaded,
        limit,
        resume,
        force,
        validate,
        sys.argv[1:],
        stop_after_s=stop_after,
        workers=workers,
        ray=ray,
    )
    if agent is None:
        _refuse_without_agent(reward, agent_sandbox, agent_mount)
        raise typer.Exit(run_request(request, Console()))
    if stop_after is not None:
        raise AgentError("--stop-after cannot be used with --agent")
    from agent.commands.agent_work import AgentOptions, run_agents

    options = AgentOptions(agent, reward, agent_sandbox, tuple(agent_mount or ()))
    raise typer.Exit(run_agents(request, options, Console()))


def _refuse_without_agent(reward: str | None, sandbox: bool, mounts: list[Path] | None) -> None:
    given = {"--reward": reward, "--agent-sandbox": sandbox, "--agent-mount": mounts}
    if wrong := [name for name, value in given.items() if value]:
        advice = "; `turntrace rescore` gives a finished run new rewards" if reward else ""
        raise AgentError(f"{', '.join(wrong)}: needs --agent{advice}")


def _tools_override(tools: str | None) -> list[str]:
    """`--tools` sets a config key, but its path is relative to the current folder."""
    if tools is None:
        return []
    path = Path(tools)
    is_file = bool(path.suffix) or path.name != tools  # a bare name is a shipped config's
    if is_file and not path.is_file():
        raise AgentError(
            f"--tools {tools}: no such file; give a shipped config by its bare name (gsm8k)"
        )
    value = str(path.resolve()) if is_file else tools
    return [
        f"rollout.multi_turn.tool_config_path={json.dumps(value)}",
        "rollout.multi_turn.enable=true",
    ]


def _n_override(n: int | None, validate: bool) -> list[str]:
    if n is None:
        return []
    return [f"rollout.val_kwargs.n={n}" if validate else f"rollout.n={n}"]
