"""Resumes interrupted conversations from their last token: a partial rollout's second half.

Invariant: what the record holds stays, token by token, whoever samples the rest; a turn that was
interrupted continues from its last token. Tools are brought into the state they were in by making
the recorded calls again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.errors import TaskError
from agent.loop.calls import ConversationTools
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task, recorded_task, task_message_count
from agent.replay.restored import restore_last_turn, restored, sampled_messages
from agent.replay.tools import LiveTools
from agent.replay.user import AskedAgainUser
from conversations.errors import ImageError, TemplateError
from conversations.rounds import is_sampled
from conversations.trajectory import Trajectory
from conversations.warning import RecordWarning

RESUME_WARNINGS = frozenset({"resumed", "tools_differ", "user_differs"})
"""The kinds that a resumed record keeps from its earlier parts."""


def continuing(
    runtime: Runtime, unfinished: Mapping[tuple[str, int], Trajectory]
) -> Callable[[Task, int], Conversation]:
    """What `run_tasks` makes conversations with to resume those that are in `unfinished`."""

    def make(task: Task, sample: int) -> Conversation:
        return continued(task, sample, unfinished.get((task.id, sample)), runtime)

    return make


def continued(task: Task, sample: int, record: Trajectory | None, runtime: Runtime) -> Conversation:
    """The conversation of `record`, resumed, or a new one if it cannot be resumed.

    It cannot without a turn, after a compaction, with another prompt, after its deadline, or if
    infrastructure failed: then it would only fail again.
    """
    try:
        if record is not None and _is_resumable(record, runtime):
            return _resumed(record, runtime)
    except (ImageError, TaskError, TemplateError):
        pass  # a new conversation says what is wrong
    return Conversation(task, sample, runtime)


def _is_resumable(record: Trajectory, runtime: Runtime) -> bool:
    if record.branches:  # its tools would have to be brought through all sequences
        return False
    failed = record.infra_error or any(line.status == "backend_error" for line in record.tool_calls)
    if failed or not record.turns or record.stop_reason == "deadline":
        return False
    sampled = sampled_messages(record)
    if len(sampled) != len(record.turns):
        return False
    task = recorded_task(record)
    created = record.messages[task_message_count(record) : sampled[0]]
    pieces = runtime.template.prompt(task.messages, _schemas(task, runtime), created)
    grids = [
        tuple(image["grid"]) for image in record.images if image["end"] <= len(record.prompt_ids)
    ]
    placed, _ = runtime.template.place(pieces, grids)
    return [token for _, ids in placed for token in ids] == record.prompt_ids


def _schemas(task: Task, runtime: Runtime) -> list[dict[str, object]]:
    if not runtime.dispatcher:
        return []
    return ConversationTools(runtime.dispatcher, task.tools_kwargs, task.ground_truth).schemas


def _resumed(record: Trajectory, runtime: Runtime) -> Conversation:
    """The conversation with all that it was. The time that it ran counts to its deadline."""
    task = recorded_task(record)
    answered = len(record.turns) - is_sampled(record.messages[-1])
    tools = None
    if runtime.dispatcher:
        tools = LiveTools(
            runtime.dispatcher,
            task,
            record,
            turns=answered,
            resumes=True,
            observer=runtime.observer,
        )
    user = AskedAgainUser.of(task, record, answered, runtime)
    conversation = restored(
        record, record.sample, runtime, Counterparts(tools, user), turns=answered
    )
    conversation.parent = record.parent
    conversation.clock.started_at = record.started_at
    conversation.clock.earlier_s = record.wall_s
    conversation.warnings += [one for one in record.warnings if one.kind in RESUME_WARNINGS]
    token = len(record.prompt_ids) + len(record.response_ids)
    place = RecordWarning("resumed", f"resumed from token {token}, where it was interrupted")
    if place not in conversation.warnings:
        conversation.warnings.append(place)
    if answered < len(record.turns):
        restore_last_turn(conversation, record)
    conversation.before = record
    return conversation
