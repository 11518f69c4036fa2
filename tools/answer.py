"""Tools that grade a submitted answer, with verl 0.6.1's replies, step penalty and reward.

The model submits an answer and reads what it is worth. An answer that is no better than the one
before costs 0.05; the trajectory's reward is what the last answer is worth.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from tools.base import BaseTool, ToolResponse

NOT_IMPROVED = -0.05


@dataclass(slots=True)
class _Submission:
    ground_truth: str | None
    reward: float = 0.0


class AnswerTool(BaseTool):
    """Takes `answer`, tells its reward. Without a ground truth the reward is None, not 0."""

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self._submissions: dict[str, _Submission] = {}

    async def grade(self, answer: str, ground_truth: str) -> tuple[float, dict[str, Any]]:
        """The reward of an answer, and metrics."""
        raise NotImplementedError

    async def create(
        self,
        instance_id: str | None = None,
        ground_truth: Any = None,
        create_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[str, ToolResponse]:
        """`ground_truth` comes by itself (verl to 0.6) or inside `create_kwargs` (later)."""
        if ground_truth is None:
            ground_truth = (create_kwargs or {}).get("ground_truth")
        instance_id = instance_id or uuid.uuid4().hex
        self._submissions[instance_id] = _Submission(
            None if ground_truth is None else str(ground_truth)
        )
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        submission = self._submission(instance_id)
        answer = str(parameters.get("answer", ""))
        if submission.ground_truth is None:
            return ToolResponse(f"Current parsed {answer=}"), None, {}
        reward, metrics = await self.grade(answer, submission.ground_truth)
        step_reward = 0.0 if reward > submission.reward else NOT_IMPROVED
        submission.reward = reward
        return ToolResponse(f"Current parsed {answer=} {reward=}"), step_reward, metrics

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        submission = self._submission(instance_id)
        return None if submission.ground_truth is None else float(submission.reward)

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._submissions.pop(instance_id, None)

    def _submission(self, instance_id: str) -> _Submission:
        try:
            return self._submissions[instance_id]
        except KeyError:
            raise LookupError(
                f"{self.name} knows no trajectory {instance_id!r}: "
                "create() was not called, or release() was"
            ) from None
