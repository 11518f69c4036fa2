"""Scores a run: each sequence of a record is one request, some records are in flight at a time.

A branch is scored behind its path, which the engine prefills and nobody compares again.

Invariant: every finished record ends in the comparison: compared, left out with a reason, or
failed. Nothing of the run is changed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from agent.engines.scoring import Scorer, Scores
from agent.errors import EngineError
from agent.scoring.compare import Compared, Comparison, compare_scores
from agent.scoring.plan import Plan, plan_of
from conversations.branches import rows
from conversations.errors import ConversationsError, RecordError
from conversations.run.open_run import TOKENIZER, Run
from conversations.run.saved_tokenizer import load_tokenizer
from conversations.run.scores import score_line
from conversations.trajectory import Trajectory

IN_FLIGHT = 16
"""Records in flight. A prefill fills the engine by itself: more would only wait there."""
LIKELIEST = 64
"""Tokens whose log-probs are asked for if the temperature is not 1; see `temperature`."""
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a record may raise whose fields have not the form of a record."""


async def score_run(
    run: Run,
    engine: Scorer,
    comparison: Comparison,
    lines: IO[bytes],
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Scores all finished records of `run` into `comparison`, and writes a line for each.

    `on_done` is called after each record.
    """
    ids, vocabulary = iter(run.ids), _vocabulary(run)

    async def work() -> None:
        for name in ids:  # shared: each name goes to one worker
            try:
                record = run.record(name)
                trajectory = Trajectory.from_record(record)
                parts = [
                    (part, await _score(part, engine, vocabulary)) for part in _parts(trajectory)
                ]
            except (ConversationsError, EngineError) as error:
                comparison.fail(name, str(error))
            else:
                comparison.add(parts)
                differences = [compared.differences for _, compared in parts]
                lines.write(score_line(name, record["sha256"], *differences))
            on_done()

    async with asyncio.TaskGroup() as workers:
        for _ in range(IN_FLIGHT):
            workers.create_task(work())


def _parts(record: Trajectory) -> Iterator[Trajectory]:
    """The trunk, and each branch with its path as its prompt. Raises RecordError."""
    try:
        for row in rows(record):
            part = row.trajectory
            # `parent` says which of the trunk's turns another run sampled.
            yield replace(part, parent=None) if row.branch and record.parent else part
    except DAMAGE as error:
        raise RecordError(f"its branches do not fit: {error}") from error


async def _score(record: Trajectory, engine: Scorer, vocabulary: int | None) -> Compared:
    try:
        plan = plan_of(record, engine.describe())
        ids = [*record.prompt_ids, *record.response_ids]
        if plan.turns and vocabulary is not None and max(ids) >= vocabulary:
            plan = Plan(left_out=Counter({"with ids the tokenizer lacks": len(record.turns)}))
        first, end = _span(record, plan)
    except DAMAGE:
        plan, ids, first, end = Plan(left_out=Counter({"damaged": 1})), [], 0, 0
    scores: Scores | None = None
    if plan.turns:
        likeliest = 1 if plan.temperature == 1.0 else LIKELIEST
        scores = await engine.score(ids[:end], first, likeliest=likeliest)
    return compare_scores(record, plan, scores, first)


def _span(record: Trajectory, plan: Plan) -> tuple[int, int]:
    """From the first token to score to the last one's end."""
    if not plan.turns:
        return 0, 0
    turns = [record.turns[number] for number in plan.turns]
    return min(turn.start for turn in turns), max(turn.end for turn in turns)


def _vocabulary(run: Run) -> int | None:
    """The number of ids in the run's tokenizer, None if it has none that can be read.

    An id outside the model's vocabulary ends an SGLang server.
    """
    try:
        return len(load_tokenizer(run.path / TOKENIZER))
    except ConversationsError:
        return None


def summary_rows(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """The comparison as names and values, for a table on one screen."""
    spreads = {"difference": comparison.differences, "below the likeliest": comparison.gaps}
    yield "records scored", f"{comparison.records}"
    yield "turns scored", f"{comparison.turns}"
    for name, spread in spreads.items():
        if not spread:
            continue
        yield f"{name}: tokens", f"{len(spread)}"
        for quantile, value in spread.quantiles().items():
            yield f"  {quantile}", f"{value:.6f}"
        yield f"  over {comparison.bound:g}", f"{spread.over} ({100 * spread.share:.3f}%)"
    if comparison.widths.over:
        yield "loosely judged (temperature over 1)", f"{comparison.widths.over} tokens"
    for reason, turns in comparison.left_out.most_common():
        yield f"left out: {reason}", f"{turns} turns"
    if comparison.failed:
        yield "records that failed", f"{len(comparison.failed)}"
