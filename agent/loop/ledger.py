"""How a call ended, and the line of the ledger that says so.

Invariant: a `CallResult` is final, and `ledger_line` is the only place that makes ledger lines:
nobody changes a line afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from conversations.messages import MalformedToolCall, ToolCall
from conversations.trajectory import Attempt, ToolCallRecord

Call = ToolCall | MalformedToolCall


class CallResult(NamedTuple):
    """How one call ended: the fields of `ToolCallRecord` that follow the call itself, in its order.

    `response` is what the model is shown, None if the call was never answered. `full_response` is
    the whole text if `response` is a part of it. A tuple, because each call makes one: a frozen
    dataclass costs five times as much.
    """

    status: str
    response: str | None
    full_response: str | None
    reward: float | None
    metrics: dict[str, Any]
    attempts: list[Attempt]
    queue_s: float
    run_s: float
    error: str | None
    images: list[str]


def unanswered(status: str, error: str | None = None) -> CallResult:
    """The result of a call that was never answered."""
    return CallResult(status, None, None, None, {}, [], 0.0, 0.0, error, [])


def not_run(call: Call) -> CallResult:
    """The result of a call as long as nothing was done about it."""
    if isinstance(call, MalformedToolCall):
        return unanswered("malformed", call.error)
    return unanswered("cancelled")


def call_id(turn: int, index: int) -> str:
    """The id of a turn's call; turns and calls count from 0."""
    return f"call_{turn}_{index}"


def ledger_line(turn: int, index: int, call: Call, result: CallResult) -> ToolCallRecord:
    """The line of one call in the ledger."""
    arguments = call.arguments if isinstance(call, ToolCall) else call.raw
    return ToolCallRecord(call_id(turn, index), turn, call.name or "", arguments, *result)


def result_of(line: ToolCallRecord) -> CallResult:
    """How a recorded call ended."""
    return CallResult(*(getattr(line, name) for name in CallResult._fields))
