"""How far a run is, in one line, and what came of it, in a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from agent.config.config import Config
from agent.loop.batch import Progress
from agent.loop.budget import ONE_AFTER_ANOTHER
from agent.terminal import LiveLine, say

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Display",
    "counts",
    "notes_on_turns_at_once",
    "say",
    "shortfall",
    "starting_line",
    "summary",
]


def notes_on_turns_at_once(config: Config) -> list[str]:
    """What a run whose model may be asked for turns at once says before it starts."""
    return [ONE_AFTER_ANOTHER] if config.rollout.turntrace.max_tokens is None else []


def starting_line(config: Config, log: Path, workers: int | None = None) -> str:
    """The line before the engine starts. Only an engine in this process has a log of its own."""
    name = config.rollout.name
    where = f" (log: {log})" if name == "sglang" else ""
    how_many = f"{workers} workers, each with " if workers else ""
    return f"starting {how_many}{name} with {config.model_path}{where}"


class Display:
    """Shows `progress` on `console` inside the `with` block. Call `refresh` often.

    An `engine` that has `tokens_in_flight` lets tokens count before their turn is complete.
    """

    def __init__(
        self,
        progress: Progress,
        console: Console,
        engine: object = None,
    ) -> None:
        self._progress = progress
        self._in_flight: Callable[[], int] | None = getattr(engine, "tokens_in_flight", None)
        self._line = LiveLine(console, self.line)
        self._started = perf_counter()
        self._turns, self._tokens = progress.turns_so_far, progress.sampled_tokens_so_far

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.hide()

    @property
    def wall_s(self) -> float:
        """Seconds since the display was made."""
        return perf_counter() - self._started

    def refresh(self) -> None:
        """Shows the counters: at once on a terminal, every ten seconds elsewhere."""
        self._line.refresh()

    def line(self) -> str:
        """The counters in one line. Rates are means since the display was made."""
        progress, seconds = self._progress, max(self.wall_s, 1e-9)
        turns = progress.turns_so_far - self._turns
        in_flight = self._in_flight() if self._in_flight else 0
        tokens = progress.sampled_tokens_so_far - self._tokens + in_flight
        state = f"{progress.done}/{progress.total} done  {progress.running} running"
        if progress.running and not turns and not tokens:
            first = "tokens" if self._in_flight else "turn"
            return f"{state}  waiting for the first {first} ({seconds:.0f} s)"
        parts = [
            state,
            f"{turns} turns ({turns / seconds:.1f}/s)",
            f"{tokens} tokens ({tokens / seconds:.0f}/s)",
            f"{progress.tool_errors} tool errors",
            f"mean reward {_number(progress.mean_reward)}",
        ]
        return "  ".join(parts)


def summary(progress: Progress, folder: Path, wall_s: float) -> str:
    """The table at the end of a run."""
    calls, invalid = progress.tool_calls, progress.invalid_calls
    rows = {
        "conversations": f"{progress.done} of {progress.total}",
        **{f"  {reason}": str(count) for reason, count in progress.stop_reasons.most_common()},
        "infrastructure errors": str(progress.infra_errors),
        "tool calls": f"{calls}, {_share(calls - invalid, calls)} valid",
        "tool errors": str(progress.tool_errors),
        "mean reward": f"{_number(progress.mean_reward)} over {progress.rewards}",
        "turns": str(progress.turns),
        "sampled tokens": str(progress.sampled_tokens),
        "wall time": f"{wall_s:.1f} s",
        "trajectories": str(folder),
    }
    return "\n".join(f"{name:<22} {value}" for name, value in rows.items())


def shortfall(progress: Progress) -> str:
    """Why a run is incomplete: what failed or is not on disk; "" if it is complete."""
    problems = []
    if progress.infra_errors:
        problems.append(
            f"{progress.infra_errors} conversations failed because of infrastructure "
            "(see `error` in their records)"
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
