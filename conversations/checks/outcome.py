"""How a conversation ended and what it was worth: identity, stop reason, budgets, reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime

from conversations.branches import Totals, sequences
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding, differs, quoted
from conversations.checks.ledger import response_tokens
from conversations.rounds import split_rounds
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from conversations.trajectory import INVALID_STATUSES, Trajectory, Turn, total_reward


def outcome_findings(
    trajectory: Trajectory, last: Trajectory, facts: RunFacts, *, finished: bool
) -> Iterator[Finding]:
    """Contradictions to the stop reason, the run's limits or the reward.

    `last` is the sequence that the conversation ended with: the record itself without branches.
    `finished` is False for a conversation that was interrupted.
    """
    yield from _identity(trajectory, facts)
    yield from _reward(trajectory)
    yield from _failure(trajectory)
    yield from _budgets(trajectory, facts)
    if facts.imported is None:  # an import may not know how a conversation ended
        yield from _Ending(last, facts, Totals.of(trajectory).turns).findings(finished)


def _identity(trajectory: Trajectory, facts: RunFacts) -> Iterator[Finding]:
    expected = f"{trajectory.task_id}-{trajectory.sample}"
    if trajectory.id != expected:
        yield Finding(differs("the id", trajectory.id, expected))
    if facts.n is not None and trajectory.sample >= facts.n:
        yield Finding(differs("the sample", trajectory.sample, f"below {facts.n}, the run's n"))
    if facts.is_replay is not None and facts.is_replay != (trajectory.parent is not None):
        expected = (
            "one: the run was made from another"
            if facts.is_replay
            else "none: the run was not made from another"
        )
        yield Finding(f"the parent, found {quoted(trajectory.parent)}, expected {expected}")
    try:
        datetime.fromisoformat(trajectory.started_at)
    except ValueError:
        yield Finding(differs("started_at", trajectory.started_at, "an ISO 8601 time"))


def _reward(trajectory: Trajectory) -> Iterator[Finding]:
    """The reward is the sum of its parts, and null after an infrastructure failure."""
    found, parts = trajectory.reward, trajectory.reward_parts
    if trajectory.infra_error:
        if found is not None or parts:
            yield Finding(
                differs(
                    "the reward of an infrastructure failure",
                    found if found is not None else parts,
                    None,
                )
            )
        return
    try:
        expected = total_reward(parts)
    except (TypeError, OverflowError):
        yield Finding(differs("reward_parts", parts, "numbers, or lists of them"))
        return
    # On disk the parts stand in another order than they were added up in.
    if (found is None) != (expected is None) or not math.isclose(
        found or 0.0, expected or 0.0, rel_tol=1e-9, abs_tol=1e-9
    ):
        yield Finding(differs("the reward is not the sum of its parts", found, expected))


def _failure(trajectory: Trajectory) -> Iterator[Finding]:
    """`infra_error`, `error`, stop reason and ledger agree on whether infrastructure failed."""
    lines = [line for part in sequences(trajectory) for line in part.tool_calls]
    failed = [line.call_id for line in lines if line.status == "backend_error"]
    if not trajectory.infra_error:
        # A chat template that refuses the messages ends a conversation with its reason, which is
        # not infrastructure: the same messages would be refused again.
        is_refused = trajectory.stop_reason == "engine_error" and trajectory.error is not None
        if (trajectory.stop_reason == "engine_error" and not is_refused) or (
            failed and trajectory.stop_reason != "cancelled"
        ):
            why = (
                "the stop reason is engine_error"
                if not failed
                else f"{failed[0]} ended with backend_error"
            )
            yield Finding(f"{differs('infra_error', False, True)}: {why}")
        # A replay says there where it left the record, a trainer why it aborted the conversation.
        may_say = (
            trajectory.parent is not None or trajectory.stop_reason == "cancelled" or is_refused
        )
        if trajectory.error is not None and not may_say:
            yield Finding(
                differs(
                    "the error of a conversation that nothing failed in", trajectory.error, None
                )
            )
    elif trajectory.error is None and not failed:
        yield Finding("infra_error is true, and neither error nor ledger says what failed")


def _budgets(trajectory: Trajectory, facts: RunFacts) -> Iterator[Finding]:
    """Tokens and turns within the run's limits."""
    response, total = (
        len(trajectory.response_ids),
        len(trajectory.prompt_ids) + len(trajectory.response_ids),
    )
    sampled = max((turn.end - turn.start for turn in trajectory.turns), default=0)
    checks = [
        ("response_ids", response, facts.response_length, "response_length"),
        ("a turn", sampled, facts.max_tokens, "max_tokens"),
        ("the turns", len(trajectory.turns), facts.max_turns, "max_assistant_turns"),
    ]
    if trajectory.turns:
        checks += [
            ("prompt_ids", len(trajectory.prompt_ids), facts.prompt_length, "prompt_length"),
            ("prompt and response", total, facts.max_model_len, "max_model_len"),
        ]
    for what, found, limit, name in checks:
        if limit is not None and found > limit:
            yield Finding(differs(f"{what} over {name}", found, f"at most {limit}"))


class _Ending:
    """The last turn against the stop reason."""

    def __init__(self, trajectory: Trajectory, facts: RunFacts, turns: int) -> None:
        parts = split_rounds(trajectory.messages)
        self.trajectory, self.facts = trajectory, facts
        self.all_turns = turns
        self.last: Turn | None = trajectory.turns[-1] if trajectory.turns else None
        self.turn = len(trajectory.turns) - 1
        self.answered = bool(parts.rounds and parts.rounds[-1].replies)
        self.message = parts.rounds[-1].message if parts.rounds else None
        self.lines = [line for line in trajectory.tool_calls if line.turn == self.turn]
        self.has_user = facts.users or any(
            each.replies and each.kind == USER for each in parts.rounds
        )
        self.calls = bool(parts.rounds and parts.rounds[-1].message.get("tool_calls"))

    def findings(self, finished: bool) -> Iterator[Finding]:
        """Contradictions, each as what the stop reason needs."""
        reason = self.trajectory.stop_reason
        if finished and reason == "cancelled" and self.trajectory.parent is None:
            yield Finding("an interrupted conversation stands among the finished ones")
        if self.facts.is_gateway:  # the program goes on after a cut turn, and ends when it likes
            return
        for turn, each in enumerate(self.trajectory.turns):
            if each.finish_reason == "abort" and (
                turn < self.turn or reason not in ("cancelled", "deadline", "engine_error")
            ):
                yield Finding(
                    "the turn was aborted, but the conversation continued or ended differently",
                    turn,
                )
        cut = self._cut_turn()
        if cut is not None and (cut < self.turn or reason != "length"):
            then = (
                "the conversation went on"
                if cut < self.turn
                else f"the stop reason is {quoted(reason)}"
            )
            yield Finding(f"the engine cut the turn, and {then}", cut)
        elif cut is not None and any(
            line.status not in ("malformed", "rejected") for line in self.lines
        ):
            yield Finding("a call of a turn that the engine cut was run", cut)
        elif self.last is None and reason in (
            "stop",
            "tool_stop",
            "length",
            "max_turns",
            "invalid_tool_calls",
        ):
            yield Finding(f"the stop reason {quoted(reason)} does not fit: there are no turns")
        elif self.last is not None and (needs := self._needs(reason, cut)):
            yield Finding(f"the stop reason {quoted(reason)} does not fit: {needs}", self.turn)
        elif reason == "prompt_too_long" and self._prompt_fits():
            yield Finding(
                f"the stop reason {quoted(reason)} does not fit: "
                f"{len(self.trajectory.prompt_ids)} tokens fit the prompt's budget"
            )

    def _prompt_fits(self) -> bool:
        facts = self.facts
        if facts.prompt_length is None or facts.max_model_len is None:
            return False
        return len(self.trajectory.prompt_ids) <= min(facts.prompt_length, facts.max_model_len - 1)

    def _cut_turn(self) -> int | None:
        """The first turn that the engine cut: it says so, and the end token is missing."""
        template = self.facts.template
        if template is None:
            return None
        prompt, ids = len(self.trajectory.prompt_ids), self.trajectory.response_ids
        ends = [
            (k, turn)
            for k, turn in enumerate(self.trajectory.turns)
            if turn.finish_reason == "length"
        ]
        return next(
            (
                k
                for k, turn in ends
                if prompt < turn.end <= prompt + len(ids)
                and ids[turn.end - 1 - prompt] not in template.end_ids
            ),
            None,
        )

    def _needs(self, reason: str, cut: int | None) -> str | None:
        """What the stop reason needs and the record does not have."""
        if reason in ("tool_stop", "max_turns", "invalid_tool_calls") and (
            self.answered or not self.calls
        ):
            return "it needs calls in the last turn that were not answered"
        if reason == "prompt_too_long":
            return "it needs a conversation without turns"
        if reason == "stop" and (self.calls or self.answered):
            return "the last turn has calls, or was answered"
        if reason == "tool_stop" and not any(line.status == "ok" for line in self.lines):
            return "it needs a call in the last turn that ended with ok"
        if reason == "invalid_tool_calls" and (found := self._invalid_in_a_row()) < (
            limit := self.facts.max_invalid_calls or 1
        ):
            return f"it needs {limit} invalid calls in a row up to the last turn, there are {found}"
        if (
            reason == "max_turns"
            and self.facts.max_turns is not None
            and self.all_turns < self.facts.max_turns
        ):
            turns = self.all_turns
            return f"there are {turns} turns, and max_assistant_turns is {self.facts.max_turns}"
        if reason == "length" and cut is None:
            return self._length_needs()
        return None

    def _invalid_in_a_row(self) -> int:
        """The longest row of invalid calls that reaches the last turn."""
        row = longest = 0
        for line in self.trajectory.tool_calls:
            row = row + 1 if line.status in INVALID_STATUSES else 0
            longest = max(longest, row) if line.turn == self.turn else 0
        return longest

    def _answer_tokens(self, template: ChatTemplate) -> int:
        """How many tokens the answers to the last turn would add, a missing end token included."""
        response = self.trajectory.response_ids
        missing = template.missing_end(response[-1] if response else None, TOOL)
        return len(missing) + response_tokens(self.lines, self.message, template, self.facts.images)

    def _length_needs(self) -> str | None:
        """`length` without a cut turn needs too little room for another turn or for the last
        responses.
        """
        facts, trajectory = self.facts, self.trajectory
        if facts.template is None or self.all_turns > len(trajectory.turns):
            return None  # after a compaction, earlier sequences used the budget too
        if not (self.calls or self.answered):
            return None if self.has_user else "the last turn is complete and has no calls"
        response, total = (
            len(trajectory.response_ids),
            len(trajectory.prompt_ids) + len(trajectory.response_ids),
        )
        if facts.response_length is None or facts.max_model_len is None:
            return None
        added = 1 if self.answered else self._answer_tokens(facts.template)
        if response + added > facts.response_length or total + added > facts.max_model_len:
            return None
        return f"{added} more tokens fit its budgets"
