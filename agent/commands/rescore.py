"""`turntrace rescore`: its options. The work is in `rescore_work.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def rescore(
    run: Annotated[Path, typer.Argument(help="The run folder whose trajectories are scored.")],
    reward: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="module:function or file.py:function.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    jobs: Annotated[int, typer.Option(min=1, help="Processes that call the function.")] = 1,
) -> None:
    """Give every trajectory a new reward, without running anything.

    The function takes a Trajectory and returns a number, a dict of numbers (reward_parts; their sum
    is the reward) or None. verl's compute_score(data_source, solution_str, ground_truth,
    extra_info) works too. Trajectories that failed because of infrastructure keep their null.
    """
    from agent.commands.rescore_work import rescore_run as run_rescore

    done = run_rescore(run, reward, out, jobs=jobs, argv=sys.argv[1:])
    mean = "-" if done.progress.mean_reward is None else f"{done.progress.mean_reward:.3f}"
    print(
        f"{done.progress.done} trajectories scored: {done.changed} rewards changed, "
        f"{done.unscored} are null, mean reward {mean} over {done.progress.rewards}: {out}"
    )
