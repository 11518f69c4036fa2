"""What a finished conversation says about the model: pure functions over trajectory records.

The protocol is: a program that runs, then an answer submitted, then a sentence and an end of its
own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from agent.recipe.setups import ANSWER_TOOL, CODE_TOOL
from conversations.trajectory import INVALID_STATUSES, ToolCallRecord, Trajectory


@dataclass(frozen=True, slots=True)
class Outcome:
    """One conversation. `recovered` is None if its task did not begin with a failing call."""

    calls: int
    valid_calls: int
    complete: bool
    right: bool
    recovered: bool | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """`part` of `whole`."""

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        """As a fraction; None if there was nothing to count."""
        return self.part / self.whole if self.whole else None


@dataclass(frozen=True, slots=True)
class OutcomeShares:
    """Shares of conversations, but `valid_calls`: of calls.

    `recovered` counts those that began with a failing call.
    """

    valid_calls: Ratio
    complete: Ratio
    right: Ratio
    recovered: Ratio


def outcome_of(trajectory: Trajectory) -> Outcome:
    """The outcome of one conversation.

    A conversation that the infrastructure failed is not the model's: leave it out.
    """
    ledger = trajectory.tool_calls
    done = complete(trajectory)
    given = given_code(trajectory)
    return Outcome(
        calls=len(ledger),
        valid_calls=sum(call.status not in INVALID_STATUSES for call in ledger),
        complete=done,
        right=trajectory.reward == 1.0,
        recovered=None if given is None else done and _recovers(ledger, given),
    )


def complete(trajectory: Trajectory) -> bool:
    """True if a program ran, an answer was submitted after it, and the model ended with text and
    no call.
    """
    names = [call.name for call in trajectory.tool_calls if call.status == "ok"]
    ran = CODE_TOOL in names
    submitted = ran and ANSWER_TOOL in names[names.index(CODE_TOOL) + 1 :]
    last = trajectory.messages[-1] if trajectory.messages else {}
    said = (
        last.get("role") == "assistant"
        and not last.get("tool_calls")
        and bool(str(last.get("content", "")).strip())
    )
    return submitted and said and trajectory.stop_reason == "stop"


def given_code(trajectory: Trajectory) -> str | None:
    """The program of a failing call that the task itself began with.

    None if it began with none.
    """
    for message in trajectory.messages:
        if message.get("raw") is None and message.get("tool_calls"):
            arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
            return str(next(iter(arguments.values())))
    return None


def _recovers(ledger: Sequence[ToolCallRecord], given: str) -> bool:
    """True if the model's own first program is another one, and runs."""
    first = next((call for call in ledger if call.name == CODE_TOOL), None)
    if first is None or first.status != "ok" or not isinstance(first.arguments, dict):
        return False
    return next(iter(first.arguments.values()), None) != given


def scores(trajectories: Sequence[Trajectory]) -> OutcomeShares:
    """Counts over all conversations but those the infrastructure failed."""
    outcomes = [outcome_of(trajectory) for trajectory in trajectories if not trajectory.infra_error]
    begun = [one.recovered for one in outcomes if one.recovered is not None]
    return OutcomeShares(
        valid_calls=Ratio(
            sum(one.valid_calls for one in outcomes), sum(one.calls for one in outcomes)
        ),
        complete=Ratio(sum(one.complete for one in outcomes), len(outcomes)),
        right=Ratio(sum(one.right for one in outcomes), len(outcomes)),
        recovered=Ratio(sum(begun), len(begun)),
    )
