"""How a call ended, and the line of the ledger that says so.

Invariant: a `CallResult` is final, and `ledger_line` is the only place that makes ledger lines:
nobody changes a line afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conversations.messages import MalformedToolCall, ToolCall
from conversations.trajectory import Attempt, ToolCallRecord

Call = ToolCall | MalformedToolCall


@dataclass(frozen=True, slots=True)
class CallResult:
    """How one call ended; the fields are those of `ToolCallRecord`.

    `response` is what the model is shown, None if the call was never answered. `full_response` is
    the whole text if `response` is a part of it.
    """

    status: str
    response: str | None = None
    full_response: str | None = None
    reward: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    attempts: Sequence[Attempt] = ()
    queue_s: float = 0.0
    run_s: float = 0.0
    error: str | None = None


CANCELLED = CallResult("cancelled")
"""The result of a call that has not ended, or never began."""


def not_run(call: Call) -> CallResult:
    """The result of a call as long as nothing was done about it."""
    if isinstance(call, MalformedToolCall):
        return CallResult("malformed", error=call.error)
    return CANCELLED


def call_id(turn: int, index: int) -> str:
    """The id of a turn's call; turns and calls count from 0."""
    return f"call_{turn}_{index}"


def ledger_line(turn: int, index: int, call: Call, result: CallResult) -> ToolCallRecord:
    """The line of one call in the ledger."""
    return ToolCallRecord(
        call_id=call_id(turn, index),
        turn=turn,
        name=call.name or "",
        arguments=call.arguments if isinstance(call, ToolCall) else call.raw,
        status=result.status,
        response=result.response,
        full_response=result.full_response,
        reward=result.reward,
        metrics=result.metrics,
        attempts=list(result.attempts),
        queue_s=result.queue_s,
        run_s=result.run_s,
        error=result.error,
    )


def result_of(line: ToolCallRecord) -> CallResult:
    """How a recorded call ended."""
    return CallResult(
        status=line.status,
        response=line.response,
        full_response=line.full_response,
        reward=line.reward,
        metrics=line.metrics,
        attempts=line.attempts,
        queue_s=line.queue_s,
        run_s=line.run_s,
        error=line.error,
    )
