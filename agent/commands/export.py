"""`turntrace export` and `turntrace stats`: a run's trajectories for those who train on them, and how its groups did."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from agent.errors import AgentError
from agent.terminal import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from conversations.export.job import Export

PLAIN_INTERVAL_S = 10.0
FORMATS = "verl-rl, verl-sft, dataproto, trl-sft, trl-preference, openrlhf-sft, openrlhf-prompts, openrlhf-preference, sharegpt, atif, parquet"
PASS_REWARD_HELP = "A sample passes with at least this reward."


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMATS)],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there yet.")],
    min_reward: Annotated[
        float | None, typer.Option(help="Keep trajectories with at least this reward.")
    ] = None,
    max_reward: Annotated[
        float | None, typer.Option(help="Keep trajectories with at most this reward.")
    ] = None,
    stop_reason: Annotated[
        list[str] | None, typer.Option(help="Keep this stop reason; may be given more than once.")
    ] = None,
    valid_calls_only: Annotated[
        bool,
        typer.Option("--valid-calls-only", help="Leave out malformed, unknown and invalid calls."),
    ] = False,
    mixed_groups: Annotated[
        bool,
        typer.Option(
            "--mixed-groups", help="Keep groups whose rewards differ: those GRPO learns from."
        ),
    ] = False,
    pass_rate: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Keep groups of which this share passes: 0.1:0.9"),
    ] = None,
    pass_reward: Annotated[float, typer.Option(help=PASS_REWARD_HELP)] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Keep trajectories of at most so many tokens, prompt included."),
    ] = None,
    dedupe: Annotated[
        bool,
        typer.Option("--dedupe", help="Keep the first of several with the same token ids."),
    ] = False,
    include_infra_errors: Annotated[
        bool, typer.Option("--include-infra-errors", help="Keep what infrastructure failed.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Trajectories in a file of dataproto.")
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
    console, opened = Console(), open_run(run)
    try:
        with _Counter(console, len(opened)) as counter:
            done = job.export(
                opened,
                to,
                out,
                filters,
                batch_size=batch_size,
                command=command_line(sys.argv[1:]),
                progress=counter.show,
            )
    except KeyboardInterrupt:
        _say(console, f"interrupted: nothing was written to {out}")
        raise typer.Exit(130) from None
    _report(console, done, out)


def stats(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    pass_reward: Annotated[float, typer.Option(help=PASS_REWARD_HELP)] = 1.0,
) -> None:
    """Print how a run's groups did: pass@k, rewards and their spread, turns, tokens, calls, stop reasons."""
    from rich.console import Console

    from conversations.export.groups import Statistics
    from conversations.run.open_run import open_run

    statistics = Statistics(pass_reward)
    for record in open_run(run).records(check=False):
        statistics.add(record)
    _say(Console(), _lines(statistics.table()))


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


class _Counter:
    """How many trajectories were read: one live line on a terminal, else a plain one every ten seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._status = console.status("") if console.is_terminal else None
        self._shown = perf_counter()

    def __enter__(self) -> _Counter:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def show(self, read: int) -> None:
        """Called for each trajectory; shows a few a second."""
        now = perf_counter()
        if now - self._shown < (0.2 if self._status else PLAIN_INTERVAL_S):
            return
        self._shown = now
        line = f"{read}/{self._total} trajectories"
        if self._status:
            self._status.update(line)
        else:
            _say(self._console, line)


def _report(console: Console, done: Export, out: Path) -> None:
    """What was written, what was not, and what a consumer will get out of texts."""
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
    _say(console, _lines(lines))
    for note in done.notes:
        _say(console, f"note: {one_line(note)}")


def _lines(table: dict[str, str]) -> str:
    width = max(map(len, table))
    return "\n".join(
        one_line(f"{name:<{width}}  {value}".rstrip()) for name, value in table.items()
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
