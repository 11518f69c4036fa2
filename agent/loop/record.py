"""The record of a conversation as it stands: what `conversations.trajectory` writes to disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent.loop.conversation import Conversation
from conversations.trajectory import Trajectory, total_reward


def trajectory_of(conversation: Conversation) -> Trajectory:
    """The record of the conversation as it stands.

    That of a resumed conversation whose tools and user were not brought back is the earlier one.
    """
    if conversation.elsewhere is not None:
        return conversation.elsewhere.record
    if conversation.before is not None:
        return _not_resumed(conversation, conversation.before)
    task, ending = conversation.task, conversation.ending
    runtime, clock = conversation.runtime, conversation.clock
    parts = {} if ending.is_failure else conversation.rewards
    stop_token_ids = runtime.template.stop_token_ids
    current = conversation.sequence()
    trunk, *branches = [*conversation.sequences, current]
    if branches and not current.turns:
        branches.pop()
    if conversation.asides:
        branches += conversation.asides.sequences()
    return Trajectory(
        id=f"{task.id}-{conversation.sample}",
        task_id=task.id,
        sample=conversation.sample,
        prompt_ids=trunk.prompt_ids,
        response_ids=trunk.response_ids,
        response_mask=trunk.response_mask,
        response_logprobs=trunk.response_logprobs,
        segments=trunk.segments,
        turns=trunk.turns,
        messages=trunk.messages,
        tool_calls=trunk.tool_calls,
        tools=trunk.tools,
        stop_reason=ending.stop_reason or "cancelled",
        num_turns=len(trunk.turns),
        infra_error=ending.infra_error,
        error=ending.error,
        warnings=conversation.warnings,
        reward=total_reward(parts),
        reward_parts=parts,
        ground_truth=task.ground_truth,
        data_source=task.data_source,
        extra=task.extra,
        engine=_engine(conversation),
        sampling={**runtime.settings.sampling, "stop_token_ids": stop_token_ids},
        parent=conversation.parent,
        started_at=clock.started_at,
        wall_s=clock.wall_s,
        images=trunk.images,
        branches=branches,
    )


def _engine(conversation: Conversation) -> dict[str, Any]:
    """What the engine says of itself, and what evidence it was asked for and gave."""
    described = conversation.runtime.engine.describe()
    if conversation.evidence is None:
        return described
    sampled = sum(conversation.tokens.response_mask())
    return {**described, "evidence": conversation.evidence.note(sampled)}


def image_files(conversation: Conversation) -> tuple[bytes, ...]:
    """The conversation's images as PNG, those that no token stands for, too."""
    if conversation.elsewhere is not None:
        return conversation.elsewhere.images
    return tuple(picture.png for picture in conversation.pictures.values())


def has_evidence(conversation: Conversation) -> bool:
    """Whether there may be an `evidence_file`, which takes time to make."""
    if conversation.elsewhere is not None:
        return conversation.elsewhere.evidence is not None
    return conversation.evidence is not None and conversation.before is None


def evidence_file(conversation: Conversation) -> bytes | None:
    """The content of the file that the record names; None if it names none."""
    if conversation.elsewhere is not None:
        return conversation.elsewhere.evidence
    if conversation.evidence is None or conversation.before is not None:
        return None
    return conversation.evidence.file(sum(conversation.tokens.response_mask()))


def _not_resumed(conversation: Conversation, before: Trajectory) -> Trajectory:
    """The earlier record as it was; as a failure if the conversation ended by itself."""
    ending = conversation.ending
    if ending.stop_reason in (None, "cancelled"):
        return before
    return replace(
        before,
        stop_reason=ending.stop_reason,
        infra_error=True,
        error=ending.error or "its tools were not brought back before its deadline",
        reward=None,
        reward_parts={},
        wall_s=conversation.clock.wall_s,
    )
