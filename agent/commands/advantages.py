"""`turntrace advantages`: group-relative advantages, written beside a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ESTIMATORS = "grpo, rloo (leave-one-out), mean"


def advantages(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    estimator: Annotated[str, typer.Option(help=ESTIMATORS)] = "grpo",
    group_size: Annotated[
        int | None,
        typer.Option(min=2, help="Samples of a whole group. Default: what the run asked for."),
    ] = None,
) -> None:
    """Write each trajectory's advantage into advantages.jsonl beside the run.

    The export `rows`, the page and `stats` show it. A group has advantages if each of its samples
    has a reward: one that infrastructure made smaller has none, and is counted.
    """
    from conversations.advantages import compute
    from conversations.run.open_run import open_run

    counts, file = compute(open_run(run), estimator, group_size)
    print(
        f"{counts.trajectories} advantages of {counts.groups - counts.incomplete} whole groups, "
        f"{counts.without_spread} of them without spread; {counts.incomplete} groups are not "
        f"whole: {file}"
    )
