"""One sequence of a record: tokens, turns, messages and ledger against each other."""

from __future__ import annotations

from collections.abc import Iterator

from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding
from conversations.checks.ledger import ledger_findings
from conversations.checks.text import text_findings
from conversations.checks.tokens import token_findings
from conversations.checks.turns import round_findings
from conversations.rounds import Rounds
from conversations.trajectory import Trajectory


def sequence_findings(
    trajectory: Trajectory,
    parts: Rounds,
    facts: RunFacts,
    *,
    with_text: bool,
    trusted: int = 0,
    is_compacted: bool = False,
) -> Iterator[Finding]:
    """What is wrong within a conversation, however it ended. `parts` are its messages by turn.

    Without `with_text`, messages and ledger are not compared. The tokens up to the end of the first
    `trusted` turns are those of another sequence: their text is not rendered again, and what
    answered their calls there stands in the ledger. `is_compacted`: it is one of several sequences.
    """
    yield from token_findings(trajectory, facts.ids, needs_logprobs=facts.imported is None)
    if not with_text:
        return
    yield from round_findings(
        trajectory, parts.rounds, is_gateway=facts.is_gateway, is_compacted=is_compacted
    )
    if facts.template is not None and _turns_lie_in_order(trajectory):
        yield from text_findings(
            trajectory, parts, facts.template, trust_prompt=facts.reads_clock, trusted=trusted
        )
    yield from ledger_findings(trajectory, parts, facts, trusted=trusted)


def _turns_lie_in_order(trajectory: Trajectory) -> bool:
    """Whether the turns lie within the tokens, in order. If not, `token_findings` has said so."""
    position = len(trajectory.prompt_ids)
    total = position + len(trajectory.response_ids)
    for turn in trajectory.turns:
        if not position <= turn.start < turn.end <= total:
            return False
        position = turn.end
    return True
