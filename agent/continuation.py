"""Conversations that were cut off, gone on with where they stood: a partial rollout's second half.

Invariant: what the record holds stays, token by token, whoever samples the rest; a turn that was cut off in the midst
goes on from its last token. Tools are brought into the state they were in by making the recorded calls again.
"""

from __future__ import annotations

from agent.dispatch import ConversationTools, ledger_lines
from agent.loop import Conversation, Runtime
from agent.replay.conversation import ReplayedConversation
from agent.replay.tools import LiveTools
from agent.tasks import Task, given_length, recorded_task
from conversations import hermes
from conversations.messages import ParsedTurn
from conversations.trajectory import Trajectory


def continued(task: Task, sample: int, record: Trajectory | None, runtime: Runtime) -> Conversation:
    """The conversation that goes on with `record`, or a new one where that cannot be: without a turn, or of another prompt."""
    if record is None or not _can_go_on(record, runtime):
        return Conversation(task, sample, runtime)
    return ContinuedConversation(record, runtime)


def _can_go_on(record: Trajectory, runtime: Runtime) -> bool:
    if record.stop_reason != "cancelled" or record.infra_error or not record.turns:
        return False
    task = recorded_task(record)
    dispatcher = runtime.dispatcher
    schemas = ConversationTools(dispatcher, task.tools_kwargs, task.ground_truth).schemas if dispatcher else []
    first = next(i for i, message in enumerate(record.messages) if message.get("raw") is not None)
    pieces = runtime.template.prompt(task.messages, schemas, record.messages[given_length(record) : first])
    return [token for _, ids in pieces for token in ids] == record.prompt_ids


class ContinuedConversation(ReplayedConversation):
    """The conversation of `record`, with all that it was; its time goes on too."""

    def __init__(self, record: Trajectory, runtime: Runtime) -> None:
        super().__init__(record, record.sample, runtime, record.parent, kept=_answered(record))
        if runtime.dispatcher:
            self.given_tools = LiveTools(runtime.dispatcher, self.task, record, recorded_prompt=False)
        self._started_at = record.started_at
        self._opened -= record.wall_s

    async def open(self) -> bool:
        """Puts everything recorded in its place; a turn that was not answered is, one that was cut off goes on."""
        fits = await super().open()
        if isinstance(self.tools, LiveTools):
            names = sorted({str(difference["name"]) for difference in self.tools.differences})
            self.warnings += [f"gone on with: {name} answered otherwise when its calls were made again" for name in names]
        self.warnings.append(f"gone on with from token {len(self.record.prompt_ids) + len(self.record.response_ids)}, where it was cut off")
        if len(self.turns) < len(self.record.turns):
            self._put_back_last()
        return fits

    def _put_back_last(self) -> None:
        record, turn = self.record, self.record.turns[-1]
        message = next(message for message in reversed(record.messages) if message.get("raw") is not None)
        shift = len(record.prompt_ids)
        logprobs: list[float] = record.response_logprobs[turn.start - shift : turn.end - shift]  # type: ignore[assignment]
        ids = record.response_ids[turn.start - shift : turn.end - shift]
        self.tokens.append_sampled(ids, logprobs)
        self.turns.append(turn)
        self.messages.append(message)
        if turn.finish_reason == "abort":
            self.cut = turn
            self.ledger += [line for line in record.tool_calls if line.turn == len(self.turns) - 1]
            return
        template = self.runtime.template
        self.turn_is_complete = ids[-1] in template.end_ids or turn.finish_reason == "stop"
        self.unanswered = hermes.parse(message["raw"], in_think=template.opens_think) if self.schemas else ParsedTurn(message["raw"])
        self.ledger += ledger_lines(self.unanswered.calls, len(self.turns) - 1)


def _answered(record: Trajectory) -> int:
    """How many turns somebody answered: all of them, or all but the last."""
    return len(record.turns) - (record.messages[-1].get("raw") is not None)
