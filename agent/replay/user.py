"""The simulated user of a restored conversation: what the record says it said, or a live one.

Invariant: a recorded answer is given only to a conversation whose messages are the recorded ones up
to there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent.errors import EndConversation
from agent.loop.conversation import USER_REWARDS
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task, recorded_task
from agent.loop.users import LoadedInteraction, SimulatedUser
from agent.replay.restored import sampled_messages
from conversations.messages import Message
from conversations.trajectory import Trajectory
from conversations.warning import RecordWarning


class AskedAgainUser(SimulatedUser):
    """A live user that is asked again, when it starts, for its answers to the first `turns` turns.

    It may have a state, too. The recorded answers stand; another answer now is a warning.
    """

    def __init__(
        self, loaded: LoadedInteraction, kwargs: Mapping[str, Any], record: Trajectory, turns: int
    ) -> None:
        super().__init__(loaded, kwargs)
        self._record = record
        self._turns = turns

    @classmethod
    def of(
        cls, task: Task, record: Trajectory, turns: int, runtime: Runtime
    ) -> AskedAgainUser | None:
        """The user that the row chooses; None without one."""
        kwargs = task.interaction_kwargs
        if runtime.interactions is None or not kwargs:
            return None
        return cls(runtime.interactions.chosen(kwargs), kwargs, record, turns)

    async def start(self) -> None:
        """Starts the instance and brings it into its state."""
        await super().start()
        messages = self._record.messages
        for turn, answer in _user_answers(self._record, self._turns):
            if await self.reply(messages[:answer]) != messages[answer]["content"]:
                text = f"asked again, the user answers turn {turn} differently; the record stands"
                self.warnings.append(RecordWarning("user_differs", text))


class RecordedUser(SimulatedUser):
    """Says what the user of `record` said, and ends the conversation where that user did.

    No interaction is loaded. The first `kept` turns were answered already.
    """

    def __init__(self, record: Trajectory, *, live_model: bool, kept: int = 0) -> None:
        self._record = record
        self._rewards = list(record.reward_parts.get(USER_REWARDS, ()))
        self.turns = len(list(_user_answers(record, kept)))
        self.rewards = [] if live_model else self._rewards
        self.failures = []
        self.warnings = []

    async def start(self) -> None:
        """Nothing is started."""

    async def reply(self, messages: Sequence[Message]) -> str | None:
        """The recorded answer; None if the recorded user failed.

        Raises EndConversation at the record's end, and if the messages are not the recorded ones.
        """
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

    async def finalize(self, within_s: float = math.inf) -> None:
        """Nothing was started."""


def _user_answers(record: Trajectory, turns: int) -> Iterator[tuple[int, int]]:
    """(turn, index of the message) of each answer of a user to the first `turns` turns."""
    messages = record.messages
    for turn, said in enumerate(sampled_messages(record)[:turns]):
        if said + 1 < len(messages) and messages[said + 1]["role"] == "user":
            yield turn, said + 1


def has_user(record: Trajectory) -> bool:
    """Whether a simulated user took part in a recorded conversation.

    One that failed at its first answer left neither a message nor a reward: its row named it.
    """
    sampled = sampled_messages(record)
    answered = bool(sampled) and any(
        message["role"] == "user" for message in record.messages[sampled[0] :]
    )
    ignored = any(warning.kind == "no_interactions" for warning in record.warnings)
    named = bool(recorded_task(record).interaction_kwargs) and not ignored
    return answered or named or USER_REWARDS in record.reward_parts


def _same(messages: Sequence[Message], recorded: Sequence[Message]) -> bool:
    def said(message: Message) -> tuple[object, object, object]:
        return message["role"], message["content"], message.get("raw")

    return list(map(said, messages)) == list(map(said, recorded))
