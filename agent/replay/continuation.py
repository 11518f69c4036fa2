"""Conversations that were cut off, gone on with where they stood: a partial rollout's second half.

Invariant: what the record holds stays, token by token, whoever samples the rest; a turn that was cut off in the midst
goes on from its last token. Tools are brought into the state they were in by making the recorded calls again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from agent.loop.calls import ConversationTools, ledger_lines
from agent.loop.loop import Conversation, Runtime
from agent.loop.tasks import Task, given_length, recorded_task
from agent.replay.conversation import ReplayedConversation
from agent.replay.tools import LiveTools
from conversations.trajectory import Trajectory
from conversations.warning import RecordWarning

RESUME_WARNINGS = frozenset({"resumed", "tools_differ"})
"""The kinds that a resumed record keeps from its earlier parts."""


def continued(task: Task, sample: int, record: Trajectory | None, runtime: Runtime) -> Conversation:
    """The conversation that goes on with `record`, or a new one where that cannot be.

    It cannot without a turn, with another prompt, after its deadline, or where infrastructure failed: that would only be run again.
    """
    if record is None or not _can_go_on(record, runtime):
        return Conversation(task, sample, runtime)
    return ContinuedConversation(record, runtime)


def _can_go_on(record: Trajectory, runtime: Runtime) -> bool:
    failed = record.infra_error or any(line.status == "backend_error" for line in record.tool_calls)
    if failed or not record.turns or record.stop_reason == "deadline":
        return False
    task = recorded_task(record)
    dispatcher = runtime.dispatcher
    schemas = (
        ConversationTools(dispatcher, task.tools_kwargs, task.ground_truth).schemas
        if dispatcher
        else []
    )
    first = next(i for i, message in enumerate(record.messages) if message.get("raw") is not None)
    pieces = runtime.template.prompt(
        task.messages, schemas, record.messages[given_length(record) : first]
    )
    return [token for _, ids in pieces for token in ids] == record.prompt_ids


class ContinuedConversation(ReplayedConversation):
    """The conversation of `record`, with all that it was; its time goes on too, and its deadline is of all that it ran."""

    def __init__(self, record: Trajectory, runtime: Runtime) -> None:
        super().__init__(
            record,
            record.sample,
            _with_the_time_left(runtime, record),
            record.parent,
            kept=_answered(record),
        )
        if runtime.dispatcher:
            self.given_tools = LiveTools(
                runtime.dispatcher, self.task, record, recorded_prompt=False
            )
        self._stands = False
        self._started_at = record.started_at
        self._opened -= record.wall_s

    async def open(self) -> bool:
        """Puts everything recorded in its place; a turn that was not answered is, one that was cut off goes on."""
        fits = await super().open()
        self.warnings += [
            warning for warning in self.record.warnings if warning.kind in RESUME_WARNINGS
        ]
        if isinstance(self.tools, LiveTools):
            self._note_differences(self.tools)
        token = len(self.record.prompt_ids) + len(self.record.response_ids)
        place = RecordWarning("resumed", f"gone on with from token {token}, where it was cut off")
        self.warnings += [place] if place not in self.warnings else []
        if len(self.turns) < len(self.record.turns):
            self._put_back_last()
        self._stands = True
        return fits

    def trajectory(self) -> Trajectory:
        """The record of the conversation; the old one where it is cut off again, or fails, before that stands here whole."""
        if self._stands:
            return super().trajectory()
        if self.stop_reason in (None, "cancelled"):
            return self.record
        error = self.error or "its tools were not brought back before its deadline"
        failed: dict[str, Any] = {
            "stop_reason": self.stop_reason,
            "infra_error": True,
            "error": error,
            "reward": None,
            "reward_parts": {},
        }
        return dataclasses.replace(self.record, wall_s=self.wall_s, **failed)

    def _note_differences(self, tools: LiveTools) -> None:
        """What the tools answered otherwise is a warning."""
        names = sorted(
            {
                difference["name"] or "what tools say when created"
                for difference in tools.differences
            }
        )
        self.warnings += [
            RecordWarning(
                "tools_differ", f"{name} answered otherwise when its calls were made again"
            )
            for name in names
        ]

    def _put_back_last(self) -> None:
        record, turn, template = self.record, self.record.turns[-1], self.runtime.template
        message = next(
            message for message in reversed(record.messages) if message.get("raw") is not None
        )
        shift = len(record.prompt_ids)
        logprobs: list[float] = record.response_logprobs[turn.start - shift : turn.end - shift]  # type: ignore[assignment]
        ids = record.response_ids[turn.start - shift : turn.end - shift]
        self.tokens.append_sampled(ids, logprobs)
        self.messages.append(message)
        self.turns.append(turn)
        ended = ids[-1] in template.end_ids
        if turn.finish_reason == "abort":
            self.cut = turn
            if not ended and self.room() > 0:
                self.ledger += [
                    line for line in record.tool_calls if line.turn == len(self.turns) - 1
                ]
                return
            self.cut = None  # it had come to its end, or to that of its budget, when it was aborted
            self.turns[-1] = turn = dataclasses.replace(
                turn, finish_reason="stop" if ended else "length"
            )
        self.turn_is_complete = ended or turn.finish_reason == "stop"
        self.unanswered = template.read(message["raw"], self.schemas, after=self.messages[-2])
        self.ledger += ledger_lines(self.unanswered.calls, len(self.turns) - 1)


def _with_the_time_left(runtime: Runtime, record: Trajectory) -> Runtime:
    deadline_s = runtime.settings.deadline_s
    if deadline_s is None:
        return runtime
    settings = dataclasses.replace(
        runtime.settings, deadline_s=max(0.0, deadline_s - record.wall_s)
    )
    return dataclasses.replace(runtime, settings=settings)


def _answered(record: Trajectory) -> int:
    """How many turns somebody answered: all of them, or all but the last."""
    return len(record.turns) - (record.messages[-1].get("raw") is not None)
