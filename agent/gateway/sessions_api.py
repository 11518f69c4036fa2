"""The bodies of `POST /sessions` and of `POST /sessions/{id}/finish`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field

from agent.gateway.request import Body, Refusal, read_body
from agent.gateway.session import GatewaySession, checked_reward
from agent.gateway.sessions import SessionOutcome
from agent.loop.tasks import Task
from conversations.trajectory import STOP_REASONS


class _Own(Body):
    """A body of a route of our own: a misspelt reward must not be one that was never given."""

    model_config = ConfigDict(extra="forbid")


class _Open(_Own):
    task_id: str | None = Field(default=None, min_length=1, max_length=512)
    sample: int = Field(default=0, ge=0, lt=1 << 31)
    ground_truth: Any = None
    data_source: Any = None
    extra: Any = None

    def task(self) -> Task:
        """The task; without an id it gets one of its own."""
        name = self.task_id or f"session-{uuid.uuid4().hex[:12]}"
        return Task(
            name,
            [],
            ground_truth=self.ground_truth,
            data_source=self.data_source,
            extra=self.extra,
        )


class _Finish(_Own):
    reward: Any = None
    reward_parts: dict[str, Any] | None = None
    stop_reason: str = "stop"
    infra_error: bool = False
    error: str | None = None
    extra: Any = None


def open_request(raw: bytes) -> _Open:
    """The body of `POST /sessions`; an empty one is a session without a task. Raises Refusal."""
    return read_body(_Open, raw or b"{}")


def opened(session: GatewaySession, key: str, url: str) -> dict[str, Any]:
    """What the client of `POST /sessions` gets."""
    return {
        "id": session.name,
        "task_id": session.task.id,
        "sample": session.sample,
        "api_key": key,
        "openai_base_url": f"{url}/v1",
        "anthropic_base_url": url,
    }


def finish_request(raw: bytes) -> SessionOutcome:
    """The body of `POST /sessions/{id}/finish`. Raises Refusal."""
    given = read_body(_Finish, raw or b"{}")
    parts = reward_parts(given.reward, given.reward_parts)
    reason = ending_reason(given.stop_reason)
    return SessionOutcome(parts, reason, given.infra_error, given.error, given.extra)


def ending_reason(reason: str) -> str:
    """The stop reason that a program gives. Raises Refusal if no finished session can have it."""
    allowed = [one for one in STOP_REASONS if one != "cancelled"]
    if reason in allowed:
        return reason
    problem = f"is unknown; allowed are {', '.join(allowed)}"
    if reason == "cancelled":
        problem = "is no end: a cancelled session is given up (DELETE /sessions/ID, `abort`)"
    raise Refusal(f"stop_reason: {reason!r} {problem}", field="stop_reason")


def reward_parts(reward: Any, parts: Mapping[str, Any] | None) -> dict[str, float]:
    """The parts of a reward; a reward without parts is one. Raises Refusal if they disagree."""
    checked = {
        name: checked_reward(f"reward_parts.{name}", value) for name, value in (parts or {}).items()
    }
    if not math.isfinite(sum(checked.values())):
        raise Refusal("reward_parts: their sum is no finite number", field="reward_parts")
    if reward is None:
        return checked
    whole = checked_reward("reward", reward)
    if not checked:
        return {"reward": whole}
    if abs(sum(checked.values()) - whole) > 1e-6 * max(1.0, abs(whole)):
        raise Refusal(
            f"reward: is {whole}, but its parts sum to {sum(checked.values())}", field="reward"
        )
    return checked
