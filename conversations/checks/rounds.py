"""A conversation's messages by turn: what stood there before the first, then each sampled message with what answered it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from conversations.checks.finding import Finding, differs
from conversations.messages import Message
from conversations.tokens import TOOL, USER
from conversations.trajectory import Trajectory


@dataclass(slots=True)
class Round:
    """A turn's message and the messages that follow it, up to the next turn."""

    message: Message
    replies: list[Message] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Who answered: the tools, or a user."""
        return USER if self.replies and self.replies[0]["role"] == USER else TOOL


@dataclass(frozen=True, slots=True)
class Rounds:
    """`opening` are the task's messages and what tools said when they were created."""

    opening: list[Message]
    rounds: list[Round]


def split(messages: list[Message]) -> Rounds:
    """The messages by turn: a sampled assistant message is one whose `raw` is text."""
    opening: list[Message] = []
    rounds: list[Round] = []
    for message in messages:
        if message["role"] == "assistant" and isinstance(message.get("raw"), str):
            rounds.append(Round(message))
        else:
            (rounds[-1].replies if rounds else opening).append(message)
    return Rounds(opening, rounds)


def round_findings(trajectory: Trajectory, rounds: list[Round]) -> Iterator[Finding]:
    """A message for each turn, answered by tools or users alone, and by somebody where another turn follows."""
    if len(rounds) != len(trajectory.turns):
        what = differs(
            "the number of messages that carry `raw`", len(rounds), len(trajectory.turns)
        )
        yield Finding(f"{what}, one a turn", min(len(rounds), len(trajectory.turns)))
    for k, each in enumerate(rounds):
        roles = sorted({reply["role"] for reply in each.replies})
        if each.replies and roles not in ([TOOL], [USER]):
            yield Finding(
                differs("the messages after the turn are by", roles, "tools or a user alone"), k
            )
        if not each.replies and k < len(rounds) - 1:
            yield Finding("no message answers the turn, and another turn follows", k)
