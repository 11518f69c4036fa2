"""What a run looks like while it goes and when it has ended: one live line, plain lines without a terminal, a table."""

from __future__ import annotations

import contextlib
from pathlib import Path
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from agent.loop.batch import Progress

PLAIN_INTERVAL_S = 10.0


def say(console: Console, text: str) -> None:
    """Prints text as it is: not wrapped, not coloured, brackets no markup. Where its reader has gone, nobody is told: a run goes on."""
    with contextlib.suppress(
        SystemExit
    ):  # rich would end the program; it prints no more from here on
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class Display:
    """Shows `progress` on `console` while in the `with` block. Call `refresh` often."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._live = (
            Live(console=console, auto_refresh=False, transient=True)
            if console.is_terminal
            else None
        )
        self._started = self._printed = perf_counter()
        self._turns, self._tokens = progress.turns_so_far, progress.sampled_tokens_so_far

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def wall_s(self) -> float:
        """Seconds since the display was made."""
        return perf_counter() - self._started

    def refresh(self) -> None:
        """Shows the counters as they are: at once on a terminal, every ten seconds elsewhere."""
        if self._live:
            self._live.update(Text(self.line()), refresh=True)
        elif perf_counter() - self._printed >= PLAIN_INTERVAL_S:
            self._printed = perf_counter()
            say(self._console, self.line())

    def line(self) -> str:
        """The counters in one line; rates are means since the start."""
        progress, seconds = self._progress, max(self.wall_s, 1e-9)
        parts = [
            f"{progress.done}/{progress.total} done",
            f"{progress.running} running",
            f"{(progress.turns_so_far - self._turns) / seconds:.1f} turns/s",
            f"{(progress.sampled_tokens_so_far - self._tokens) / seconds:.0f} tokens/s",
            f"{progress.tool_errors} tool errors",
            f"mean reward {_number(progress.mean_reward)}",
        ]
        return "  ".join(parts)


def summary(progress: Progress, folder: Path, wall_s: float) -> str:
    """The table at a run's end."""
    rows = {
        "conversations": f"{progress.done} of {progress.total}",
        **{f"  {reason}": str(count) for reason, count in progress.stop_reasons.most_common()},
        "infrastructure errors": str(progress.infra_errors),
        "tool calls": f"{progress.tool_calls}, {_share(progress.tool_calls - progress.invalid_calls, progress.tool_calls)} valid",
        "tool errors": str(progress.tool_errors),
        "mean reward": f"{_number(progress.mean_reward)} over {progress.rewards}",
        "turns": str(progress.turns),
        "sampled tokens": str(progress.sampled_tokens),
        "wall time": f"{wall_s:.1f} s",
        "trajectories": str(folder),
    }
    return "\n".join(f"{name:<22} {value}" for name, value in rows.items())


def shortfall(progress: Progress) -> str:
    """Why a run is not whole: conversations that infrastructure failed, and those that are not on disk; "" where it is."""
    problems = []
    if progress.infra_errors:
        problems.append(
            f"{progress.infra_errors} conversations failed by infrastructure (see `error` in their records)"
        )
    if (missing := (progress.total or 0) - progress.done) > 0:
        first = f" ({progress.lost[0]})" if progress.lost else ""
        problems.append(f"{missing} conversations are missing{first}")
    return " and ".join(problems)


def counts(progress: Progress) -> dict[str, object]:
    """The counters as run.json keeps them."""
    return {
        "asked": progress.total,
        "done": progress.done,
        "infra_errors": progress.infra_errors,
        "stop_reasons": dict(progress.stop_reasons),
        "turns": progress.turns,
        "sampled_tokens": progress.sampled_tokens,
        "tool_calls": progress.tool_calls,
        "tool_errors": progress.tool_errors,
        "invalid_calls": progress.invalid_calls,
        "mean_reward": progress.mean_reward,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
