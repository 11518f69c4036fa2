"""One recorded conversation, run again or gone on with from one of its turns.

Invariant: kept turns are the parent's, token by token: same ids, authors, log-probs, turns, messages and ledger. Whoever
trains on a fork and wants its fresh turns alone masks `response_ids` before `turns[parent["turn"]].start`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from agent.engines.scripted import Playback
from agent.loop.calls import ConversationTools
from agent.loop.loop import Conversation, Runtime
from agent.loop.tasks import recorded_task
from agent.loop.users import SimulatedUser
from agent.replay.tools import LiveTools
from conversations.messages import Message
from conversations.tokens import SAMPLED
from conversations.trajectory import INVALID_STATUSES, Trajectory
from conversations.warning import RecordWarning


def played_back(runtime: Runtime, record: Trajectory, first: int = 0) -> Runtime:
    """The runtime whose model is the record, from turn `first` on: with the sampling params of the record, and no clock."""
    sampling = {key: value for key, value in record.sampling.items() if key != "stop_token_ids"}
    settings = dataclasses.replace(runtime.settings, deadline_s=None, sampling=sampling)
    return dataclasses.replace(runtime, engine=Playback(record, first), settings=settings)


class ReplayedConversation(Conversation):
    """`record` run again as sample `sample` of its task; `kept` turns stand already, None: not even the prompt does."""

    def __init__(
        self,
        record: Trajectory,
        sample: int,
        runtime: Runtime,
        parent: dict[str, Any] | None,
        *,
        kept: int | None,
    ) -> None:
        super().__init__(recorded_task(record), sample, runtime)
        self.record = record
        self.kept = kept
        self.parent = parent
        self.given_tools: ConversationTools | None = None
        self.given_user: SimulatedUser | None = None

    def make_tools(self) -> ConversationTools | None:
        """The tools it was given."""
        return self.given_tools

    def make_user(self) -> SimulatedUser | None:
        """The user it was given, else one of the run's interactions."""
        return self.given_user or super().make_user()

    async def open(self) -> bool:
        """Renders the prompt anew, or puts the kept turns in place and brings the tools into the state after them.

        False where nothing can go on from there: the prompt is too long, or a tool's backend failed.
        """
        if self.kept is None:
            return await super().open()
        self.tools = self.make_tools()
        created = await self.tools.create() if self.tools else []
        if isinstance(self.tools, LiveTools):
            await self.tools.rebuild(self.kept, created)
            self._check_state(self.tools)
        self._keep_tokens(self.kept)
        self.user = self.make_user()
        if self.user:
            await self.user.start()
        await self._keep_turns(self.kept)
        settings = self.runtime.settings
        return not self.infra_error and len(self.record.prompt_ids) <= min(
            settings.prompt_length, settings.max_model_len - 1
        )

    def _check_state(self, tools: LiveTools) -> None:
        """Tools whose backend failed meanwhile are not in the state that the kept turns left them in: nothing goes on from there."""
        for _, line in tools.asked_again:
            if line.status == "backend_error":
                self.fail("engine_error", f"{line.call_id} could not be made again: {line.error}")

    async def collect_rewards(self) -> None:
        """As ever; then the recorded calls that were not come to are compared as well."""
        await super().collect_rewards()
        if isinstance(self.tools, LiveTools) and self.stop_reason == "cancelled":
            await self.tools.run_rest()

    def _keep_tokens(self, turns: int) -> None:
        record = self.record
        ids, shift = record.prompt_ids + record.response_ids, len(record.prompt_ids)
        end = record.turns[turns].start if turns < len(record.turns) else len(ids)
        for kind, start, stop in record.segments:
            part = ids[start : min(stop, end)]
            if kind == SAMPLED and part:
                logprobs: list[Any] = record.response_logprobs[
                    start - shift : start - shift + len(part)
                ]
                self.tokens.append_sampled(part, logprobs)
            else:
                self.tokens.append(kind, part)

    async def _keep_turns(self, turns: int) -> None:
        """Messages, ledger and warnings of the kept turns; the user, who may have a state too, answers them again."""
        record = self.record
        self.turns = record.turns[:turns]
        self.ledger = [line for line in record.tool_calls if line.turn < turns]
        starts = [i for i, message in enumerate(record.messages) if message.get("raw") is not None]
        ends = [*starts, len(record.messages)]
        self.messages: list[Message] = record.messages[: ends[0]]
        for turn in range(turns):
            said, *answers = record.messages[starts[turn] : ends[turn + 1]]
            self.messages.append(said)
            is_user = answers and answers[0]["role"] == "user"
            if (
                self.user
                and is_user
                and await self.user.reply(self.messages) != answers[0]["content"]
            ):
                text = f"the user, asked again, answers turn {turn} otherwise than recorded; the recorded answer stands"
                self.warnings.append(RecordWarning("user_differs", text))
            self.messages += answers
            lines = [line for line in self.ledger if line.turn == turn]
            self.warn(said, lines)
            for line in lines:
                self._invalid_in_a_row = (
                    self._invalid_in_a_row + 1 if line.status in INVALID_STATUSES else 0
                )
