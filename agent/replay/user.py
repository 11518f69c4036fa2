"""The simulated user of a replayed conversation: what the record says it said.

Invariant: a recorded answer is given only to a conversation whose messages are the recorded ones up to there.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.errors import EndConversation
from agent.loop.users import SimulatedUser
from conversations.messages import Message
from conversations.trajectory import Trajectory

REWARDS = "user_turn_rewards"
"""Where a record's `reward_parts` keep them."""


class RecordedUser(SimulatedUser):
    """Says what the user of `record` said, and ends the conversation where that user did; no interaction is loaded."""

    def __init__(self, record: Trajectory, *, live_model: bool) -> None:
        self._record = record
        self._rewards = list(record.reward_parts.get(REWARDS, ()))
        self.turns = 0
        self.rewards = [] if live_model else self._rewards
        self.failures = []

    async def start(self) -> None:
        """Nothing is started."""

    async def reply(self, messages: Sequence[Message]) -> str | None:
        """The recorded answer; None where the recorded user failed. Raises EndConversation at the record's end, and off its way."""
        record, count = self._record, len(messages)
        if not _same(messages, record.messages[:count]):
            raise EndConversation("cancelled", "replay: the user has no recorded answer to this")
        self.turns += 1
        if count < len(record.messages):
            return str(record.messages[count]["content"])
        self.rewards = self._rewards
        if record.infra_error and record.stop_reason != "engine_error":
            self.failures = [record.error] if record.error else []
            return None
        raise EndConversation(record.stop_reason, record.error)

    async def finalize(self) -> None:
        """Nothing was started."""


def has_user(record: Trajectory) -> bool:
    """Whether a simulated user took part in a recorded conversation."""
    sampled = [i for i, message in enumerate(record.messages) if message.get("raw") is not None]
    answered = bool(sampled) and any(
        message["role"] == "user" for message in record.messages[sampled[0] :]
    )
    return answered or REWARDS in record.reward_parts


def _same(messages: Sequence[Message], recorded: Sequence[Message]) -> bool:
    def said(message: Message) -> tuple[object, object, object]:
        return message["role"], message["content"], message.get("raw")

    return list(map(said, messages)) == list(map(said, recorded))
