"""`turntrace replay`: its options. The work is in `agent.replay.runner`."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.options import refuse_force_alone


class Part(StrEnum):
    """Where a part of a replay comes from."""

    recorded = "recorded"
    live = "live"


def replay(
    run: Annotated[Path, typer.Argument(help="The run folder to replay.")],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    model: Annotated[
        Part | None,
        typer.Option(
            help="recorded: play the sampled tokens; live: sample now. Default: recorded, "
            "live with --from-turn."
        ),
    ] = None,
    tools: Annotated[
        Part | None,
        typer.Option(
            help="recorded: the ledger's answers; live: run the tools now. Default: recorded, "
            "live with --from-turn."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.yaml instead of the run's own.")
    ] = None,
    tools_config: Annotated[
        str | None, typer.Option(help="With --tools live: tools.yaml, or a shipped one's name.")
    ] = None,
    trust_tools: Annotated[
        bool,
        typer.Option(
            "--trust-tools",
            help="With --tools live: import the tools that the run names, even if they are not "
            "turntrace's own.",
        ),
    ] = False,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these trajectories: an id, or several with commas. May be repeated."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N.")] = None,
    from_turn: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Fork: keep the turns before this one (0: only the prompt) and sample new ones.",
        ),
    ] = None,
    n: Annotated[
        int, typer.Option(min=1, help="With a live model: branches of each trajectory.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the replay in --out.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: continue even if something changed.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the report as one JSON object. Everything else goes to stderr."
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key.")
    ] = None,
) -> None:
    """Replay a run into a new one and say where each trajectory first differs.

    Both recorded (default): checks the record and this code. No model runs and nothing is imported.

    Recorded model, live tools: every call is made again and its answer is compared. If an answer
    changes what the model would have seen, the new trajectory ends; later calls are still compared.

    Live model, recorded tools: recorded answers are served as long as the calls are the recorded
    ones. To get the same tokens, sample greedily and one at a time (--set rollout.max_num_seqs=1):
    SGLang's arithmetic depends on what else is in the batch.

    Both live: the run is done again.

    Exit code 0: all identical (a fork: its tools are in the state they were in). 3: some diverged.
    1: some failed or are missing. 2: a user's mistake.
    """
    refuse_force_alone(force, resume)
    from rich.console import Console

    from agent.replay.request import LIVE, RECORDED, ReplayRequest
    from agent.replay.runner import replay_run

    default = RECORDED if from_turn is None else LIVE
    request = ReplayRequest(
        run=run,
        out=out,
        model=str(model or default),
        tools=str(tools or default),
        config=config,
        overrides=set_ or [],
        tools_config=tools_config,
        trust_tools=trust_tools,
        ids=ids or [],
        limit=limit,
        from_turn=from_turn,
        n=n,
        resume=resume,
        force=force,
        argv=sys.argv[1:],
    )
    code, report = replay_run(request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    raise typer.Exit(code)
