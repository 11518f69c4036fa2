"""The work of `turntrace gateway`: serve until Ctrl-C, and say what there is.

Invariant: exit code 0 means that every session that was opened has its record in the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console

from agent.config.config import Config
from agent.gateway import Gateway
from agent.runs.ending import DONE, INCOMPLETE, sigterm_as_interrupt
from agent.runs.manifest import command_line
from agent.runs.progress import notes_on_turns_at_once, starting_line
from agent.terminal import LiveLine, say

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class GatewayRequest:
    """What the command line asks for; `argv` are its words, for run.json and for the advice."""

    config: Config
    out: Path
    host: str
    port: int
    admin_key: str | None
    open_to_all: bool
    resume: bool
    force: bool
    argv: Sequence[str]


def serve_gateway(request: GatewayRequest, console: Console) -> int:
    """Serves until Ctrl-C or SIGTERM. Returns the exit code; raises the packages' own errors."""
    for note in notes_on_turns_at_once(request.config):
        say(console, f"note: {note}")
    say(console, starting_line(request.config, request.out / "engine.log"))
    gateway = Gateway(
        request.config,
        request.out,
        host=request.host,
        port=request.port,
        admin_key=request.admin_key,
        open_to_all=request.open_to_all,
        resume=request.resume,
        force=request.force,
        argv=request.argv,
    )
    with sigterm_as_interrupt(), gateway:
        try:
            _announce(gateway, console)
            with LiveLine(console, _Line(gateway)) as line:
                while True:
                    line.refresh()
                    time.sleep(POLL_S)
        except KeyboardInterrupt:
            live = len(gateway.sessions.live)
    say(console, f"{gateway.progress.done} sessions are in {request.out}")
    if not live:
        return DONE
    argv = request.argv if request.resume else [*request.argv, "--resume"]
    say(console, f"{live} did not end; go on with them by: {command_line(argv)}")
    return INCOMPLETE


def _announce(gateway: Gateway, console: Console) -> None:
    say(console, f"listening on {gateway.url} (OpenAI: {gateway.url}/v1, Anthropic: {gateway.url})")
    if gateway.restored:
        say(console, f"{gateway.restored} sessions go on where they were")


@dataclass(slots=True)
class _Line:
    """The line of progress."""

    gateway: Gateway
    started: float = 0.0
    turns: int = 0

    def __post_init__(self) -> None:
        self.started = perf_counter()
        self.turns = self.gateway.progress.turns_so_far

    def __call__(self) -> str:
        gateway, progress = self.gateway, self.gateway.progress
        seconds = max(perf_counter() - self.started, 1e-9)
        turns = progress.turns_so_far - self.turns
        reward = "-" if progress.mean_reward is None else f"{progress.mean_reward:.3f}"
        reasons = ", ".join(f"{n} {why}" for why, n in gateway.sessions.reasons.most_common())
        lag_ms = gateway.server.lag.figures()["p99"]
        return "  ".join(
            [
                f"{len(gateway.sessions.live)} sessions, {progress.done} finished",
                f"{turns} turns ({turns / seconds:.1f}/s)",
                f"branches: {reasons or '-'}",
                f"loop lag p99 {lag_ms:.1f} ms",
                f"mean reward {reward}",
            ]
        )
