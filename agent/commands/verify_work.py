"""The work of `turntrace verify --engine`: start or reach the engine, score the run, sum up.

Invariant: the run's own config is not used: the user names the engine. `scores.jsonl` is written
whole at the end or not at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from rich.console import Console

from agent.config.config import Config, load_config
from agent.config.secrets import without_userinfo
from agent.engines.engine import Engine
from agent.engines.scoring import Scorer
from agent.errors import AgentError
from agent.runs.ending import sigterm_as_interrupt
from agent.runs.parts import start_engine
from agent.runs.progress import starting_line
from agent.scoring.compare import LIMIT, SHARE, Comparison
from agent.scoring.work import score_run, summary_rows
from agent.terminal import LiveLine, one_line, say
from conversations.run.open_run import Run, open_run
from conversations.run.scores import SCORES, write_scores

FAILURES = 3
"""Records that failed and are named."""


def verify_engine(
    path: Path, engine: str, config: Config, bound: float | None, console: Console
) -> Comparison:
    """Scores the run in `path` with `engine`, a config file or a server's URL, and its `config`.

    Writes scores.jsonl beside the records. Raises AgentError, also if the engine cannot score.
    """
    run = open_run(path)
    if not os.access(path, os.W_OK):
        raise AgentError(f"{path} cannot be written: {SCORES} belongs there")
    for notice in config.notices():
        say(console, f"note: {notice}")
    log = _log_file() if config.rollout.name == "sglang" else None
    say(console, starting_line(config, log) if log else f"scoring with {without_userinfo(engine)}")
    with tempfile.TemporaryFile() as lines, sigterm_as_interrupt():
        started = start_engine(config, log)
        comparison = asyncio.run(_score(run, started, bound, lines, console))
        lines.seek(0)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_scores(path, {"created": created, **comparison.as_json()}, lines)
    if log:
        log.unlink()
    return comparison


def _log_file() -> Path:
    """Not in the run folder, which may come from anybody and hold a link of that name."""
    descriptor, name = tempfile.mkstemp(prefix="turntrace-engine-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def engine_config(engine: str) -> Config:
    """The config that `--engine` names: a file, or an SGLang server at a URL.

    Raises AgentError.
    """
    if engine.startswith(("http://", "https://")):
        urls = json.dumps([engine])
        return load_config(None, ["rollout.name=sglang_server", f"rollout.server.urls={urls}"])
    if not Path(engine).is_file():
        raise AgentError(
            f"--engine {engine}: no such config file; a server is given as http://HOST:PORT"
        )
    return load_config(Path(engine))


async def _score(
    run: Run, engine: Engine, bound: float | None, lines: IO[bytes], console: Console
) -> Comparison:
    try:
        if connect := getattr(engine, "connect", None):
            await connect()
        if not isinstance(engine, Scorer):
            name = engine.describe().get("name")
            raise AgentError(f"the engine {name} cannot score tokens; name sglang or sglang_server")
        comparison, done = Comparison(engine.describe(), bound), 0

        def count() -> None:
            nonlocal done
            done += 1
            progress.refresh()

        with LiveLine(console, lambda: f"{done}/{len(run)} records scored") as progress:
            progress.refresh()
            await score_run(run, engine, comparison, lines, count)
        return comparison
    finally:
        await engine.close()


def show_comparison(comparison: Comparison) -> None:
    """Prints the comparison as a table, its worst turns and the verdict."""
    rows = list(summary_rows(comparison))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{one_line(name):<{width}}  {one_line(value)}")
    if comparison.worst:
        print("worst turns (difference, recorded minus the engine's):")
    for worst in comparison.worst:
        print(
            f"  {worst.difference:+.6f}  trajectory {one_line(worst.id[:200])} "
            f"{f'branch {worst.branch} ' if worst.branch else ''}"
            f"turn {worst.turn} token {worst.token}"
        )
    for name, error in list(comparison.failed.items())[:FAILURES]:
        print(f"failed: trajectory {one_line(name[:200])}: {one_line(error[:400])}")
    print(_verdict(comparison))


def _verdict(comparison: Comparison) -> str:
    """One line: whether the engine gives the recorded log-probs."""
    if not len(comparison.differences):
        return "the engine scored no token of this run"
    rule = f"at most {100 * SHARE:g}% of the tokens over {comparison.bound:g}, none over {LIMIT:g}"
    if comparison.is_met:
        return f"the engine gives the recorded log-probs ({rule})"
    if comparison.differences.is_met and comparison.gaps.is_met:
        return f"{len(comparison.failed)} records could not be scored"
    return (
        f"the engine does not give the recorded log-probs ({rule}): tokens were changed, or "
        "temperature or weights are others"
    )
