"""The record of a session as it stands."""

from __future__ import annotations

from typing import Any

from agent.gateway.session import GatewaySession
from conversations.trajectory import Trajectory, total_reward
from conversations.warning import RecordWarning


def trajectory_of_session(session: GatewaySession) -> Trajectory:
    """The trunk and its branches, under the session's (task, sample)."""
    task, ending, runtime = session.task, session.ending, session.runtime
    parts = {} if ending.is_failure else session.reward_parts
    settings, template = runtime.settings, runtime.template
    return Trajectory(
        id=f"{task.id}-{session.sample}",
        task_id=task.id,
        sample=session.sample,
        stop_reason=ending.stop_reason or "cancelled",
        infra_error=ending.infra_error,
        error=ending.error,
        warnings=_warnings(session),
        reward=total_reward(parts),
        reward_parts=dict(parts),
        ground_truth=task.ground_truth,
        data_source=task.data_source,
        extra=_extra(session),
        engine=runtime.engine.describe(),
        sampling={**settings.sampling, "stop_token_ids": template.stop_token_ids},
        parent=None,
        started_at=session.clock.started_at,
        wall_s=session.clock.wall_s,
        **session.tree.record_fields(),
    )


def _extra(session: GatewaySession) -> Any:
    """The task's, and under `session` what the program said at its end."""
    if not session.said_at_end:
        return session.task.extra
    extra = session.task.extra
    given = extra if isinstance(extra, dict) else {} if extra is None else {"task": extra}
    return {**given, "session": session.said_at_end}


def _warnings(session: GatewaySession) -> list[RecordWarning]:
    if not session.refused:
        return []
    count = "1 request was" if session.refused == 1 else f"{session.refused} requests were"
    text = f"{count} refused: too long, or refused by the chat template"
    return [RecordWarning("refused_requests", text)]
