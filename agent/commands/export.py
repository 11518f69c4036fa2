"""`turntrace export` and `turntrace stats`: trajectories for trainers, and how groups did."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.errors import AgentError
from agent.terminal import LiveLine, one_line

if TYPE_CHECKING:
    from conversations.export.export import Export

FORMATS = (
    "verl-rl, verl-sft, dataproto, trl-sft, trl-preference, openrlhf-sft, openrlhf-prompts, "
    "openrlhf-preference, sharegpt, atif, openai, rows, parquet"
)
PASS_REWARD_HELP = "A sample passes with at least this reward."


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMATS)],
    out: Annotated[Path, typer.Option(help="The folder to write. It must not exist.")],
    min_reward: Annotated[
        float | None, typer.Option(help="Keep trajectories with at least this reward.")
    ] = None,
    max_reward: Annotated[
        float | None, typer.Option(help="Keep trajectories with at most this reward.")
    ] = None,
    stop_reason: Annotated[
        list[str] | None, typer.Option(help="Keep this stop reason. May be repeated.")
    ] = None,
    valid_calls_only: Annotated[
        bool,
        typer.Option("--valid-calls-only", help="Leave out malformed, unknown and invalid calls."),
    ] = False,
    mixed_groups: Annotated[
        bool,
        typer.Option(
            "--mixed-groups", help="Keep groups whose rewards differ: GRPO learns only from them."
        ),
    ] = False,
    pass_rate: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Keep groups with this share of passes: 0.1:0.9"),
    ] = None,
    pass_reward: Annotated[float, typer.Option(help=PASS_REWARD_HELP)] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Keep trajectories of at most N tokens, prompt included."),
    ] = None,
    dedupe: Annotated[
        bool,
        typer.Option("--dedupe", help="Keep the first of several with the same token ids."),
    ] = False,
    include_infra_errors: Annotated[
        bool,
        typer.Option(
            "--include-infra-errors",
            help="Keep trajectories that failed because of infrastructure.",
        ),
    ] = False,
    branches: Annotated[
        str,
        typer.Option(metavar="trunk|all", help="Sequences of a session: its trunk alone, or all."),
    ] = "all",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Trajectories in each file of dataproto.")
    ] = 256,
) -> None:
    """Write a run's trajectories in a trainer's format, with a dataset card."""
    from rich.console import Console

    from agent.runs.manifest import command_line
    from conversations.export import job
    from conversations.export.filters import Filters
    from conversations.run.open_run import open_run

    filters = Filters(
        min_reward=min_reward,
        max_reward=max_reward,
        stop_reasons=frozenset(stop_reason or ()),
        valid_calls_only=valid_calls_only,
        mixed_groups=mixed_groups,
        pass_rate=_band(pass_rate),
        pass_reward=pass_reward,
        max_tokens=max_tokens,
        dedupe=dedupe,
        include_infra_errors=include_infra_errors,
    )
    opened = open_run(run)
    read = 0

    def show_progress(trajectories: int) -> None:
        nonlocal read
        read = trajectories
        progress.refresh()

    try:
        with LiveLine(Console(), lambda: f"{read}/{len(opened)} trajectories") as progress:
            done = job.export_run(
                opened,
                to,
                out,
                filters,
                batch_size=batch_size,
                branches=branches,
                command=command_line(sys.argv[1:]),
                progress=show_progress,
            )
    except KeyboardInterrupt:
        print(f"interrupted: nothing was written to {out}")
        raise typer.Exit(130) from None
    _report(done, out)


def stats(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    pass_reward: Annotated[float, typer.Option(help=PASS_REWARD_HELP)] = 1.0,
) -> None:
    """Print statistics of a run's groups: pass@k, rewards, turns, tokens, calls, stop reasons."""
    from conversations.advantages import SavedAdvantages
    from conversations.checks.shape import well_formed
    from conversations.export.groups import Statistics
    from conversations.run.open_run import open_run

    if math.isnan(pass_reward):
        raise AgentError("--pass-reward nan: a reward to compare with is a number")
    opened = open_run(run)
    statistics, advantages = Statistics(pass_reward), SavedAdvantages(opened.path)
    for record in map(well_formed, opened.records(check=False)):
        statistics.add(record)
        statistics.add_advantage(advantages.of(record))
    print(_lines(statistics.table()))


def _band(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        return float(low or 0), float(high or 1) if colon else float(low)
    except ValueError as error:
        raise AgentError(
            f"--pass-rate {text}: a band is LOW:HIGH, two numbers from 0 to 1 such as 0.1:0.9"
        ) from error


def _report(done: Export, out: Path) -> None:
    """Prints what was written, what was left out, and what a trainer will make of the texts."""
    from conversations.export.card import plural
    from conversations.export.text import VERDICTS

    lines = {
        "written": f"{done.rows} {plural(done.format.unit, done.rows)} for {done.format.consumer}"
    }
    lines["trajectories kept"] = f"{done.kept.trajectories} of {done.whole.trajectories}"
    lines |= {
        f"  left out: {reason}": str(count)
        for reason, count in (done.dropped + done.left_out).most_common()
    }
    for name, meaning in VERDICTS.items():
        if count := done.verdicts[name]:
            lines[f"  {name}"] = f"{count}: {meaning}"
    table = done.kept.table()
    lines |= {
        name: table[name]
        for name in table
        if name.startswith(("groups", "  rewards", "reward,", "pass@"))
    }
    lines["folder"] = str(out)
    print(_lines(lines))
    for note in done.notes:
        print(f"note: {one_line(note)}")


def _lines(table: dict[str, str]) -> str:
    width = max(map(len, table))
    return "\n".join(
        one_line(f"{name:<{width}}  {value}".rstrip()) for name, value in table.items()
    )
