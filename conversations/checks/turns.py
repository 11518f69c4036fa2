"""Messages against turns: one sampled message a turn, and somebody who answers it."""

from __future__ import annotations

from collections.abc import Iterator

from conversations.checks.finding import Finding, differs
from conversations.rounds import Round
from conversations.tokens import TOOL, USER
from conversations.trajectory import Trajectory


def round_findings(
    trajectory: Trajectory,
    rounds: list[Round],
    *,
    is_gateway: bool = False,
    is_compacted: bool = False,
) -> Iterator[Finding]:
    """One message a turn, answered by tools or a user alone; only the last may be unanswered.

    The client of a gateway answers with messages of any roles. In a compacted conversation a user
    message, the request for a summary, stands behind the tools'.
    """
    allowed = [[TOOL], [USER], [TOOL, USER]] if is_compacted else [[TOOL], [USER]]
    if len(rounds) != len(trajectory.turns):
        what = differs(
            "the number of messages that carry `raw`", len(rounds), len(trajectory.turns)
        )
        yield Finding(f"{what}, one a turn", min(len(rounds), len(trajectory.turns)))
    for k, each in enumerate(rounds):
        roles = sorted({reply["role"] for reply in each.replies})
        if each.replies and not is_gateway and roles not in allowed:
            yield Finding(
                differs("the messages after the turn are by", roles, "tools or a user alone"), k
            )
        if not each.replies and k < len(rounds) - 1:
            yield Finding("no message answers the turn, and another turn follows", k)
