"""GSM8K answers, graded as verl 0.6.1 grades them (`verl/utils/reward_score/gsm8k.py`, `verl/tools/gsm8k_tool.py`).

The model submits an answer and is told what was read from it and what it is worth. An answer that does not improve on
the one before costs -0.05; the trajectory's reward is what the last answer is worth.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from tools.base import BaseTool, ToolConfigError, ToolResponse

Method = Literal["flexible", "strict"]

# The answer stands at the end: verl reads the last 300 characters only, and so do we.
CLIP_CHARS = 300
NOT_IMPROVED = -0.05

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"(-?[0-9.,]+)")


def extract_answer(text: str, method: Method = "flexible") -> str | None:
    """The answer in a solution: after the last `#### ` (strict), or the last number (flexible); None without one."""
    text = text[-CLIP_CHARS:]
    if method == "strict":
        marked = _STRICT.findall(text)
        return marked[-1].replace(",", "") if marked else None
    numbers: list[str] = _NUMBER.findall(text)
    if not numbers:
        return None
    # verl falls back on the first match where every one of them is a lone full stop.
    return next((number for number in reversed(numbers) if number != "."), numbers[0])


def grade(text: str, ground_truth: str, method: Method = "flexible") -> float:
    """1.0 for the right answer, 0.0 for a wrong one, the integer 0 for none (verl shows the model that difference)."""
    answer = extract_answer(text, method)
    if answer is None:
        return 0
    return 1.0 if answer == ground_truth else 0.0


@dataclass(slots=True)
class _Submission:
    ground_truth: str | None
    solution: str = ""
    reward: float = 0.0


class Gsm8kTool(BaseTool):
    """Takes `answer` and tells its reward. The tool's name is the schema's: `calculate_answer`, `calc_gsm8k_reward`, any.

    config: `method`, `flexible` (the default, as in verl) or `strict`.
    A task without a ground truth has no reward: None, not 0.
    """

    config_keys = frozenset({"method"})

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self.method: Method = config.get("method", "flexible")
        if self.method not in ("flexible", "strict"):
            raise ToolConfigError(f"config.method must be flexible or strict, got {self.method!r}")
        self._submissions: dict[str, _Submission] = {}

    async def create(
        self,
        instance_id: str | None = None,
        ground_truth: Any = None,
        create_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[str, ToolResponse]:
        """`ground_truth` by itself (verl to 0.6) or inside `create_kwargs` (later versions)."""
        if ground_truth is None:
            ground_truth = (create_kwargs or {}).get("ground_truth")
        instance_id = instance_id or uuid.uuid4().hex
        self._submissions[instance_id] = _Submission(None if ground_truth is None else str(ground_truth))
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        submission = self._submission(instance_id)
        answer = str(parameters.get("answer", ""))
        submission.solution = answer if answer.startswith("#### ") else f"#### {answer}"
        reward = self._reward(submission)
        if reward is None:
            return ToolResponse(f"Current parsed {answer=}"), None, {}
        step_reward = 0.0 if reward > submission.reward else NOT_IMPROVED
        submission.reward = reward
        return ToolResponse(f"Current parsed {answer=} {reward=}"), step_reward, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        reward = self._reward(self._submission(instance_id))
        return None if reward is None else float(reward)

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._submissions.pop(instance_id, None)

    def _reward(self, submission: _Submission) -> float | None:
        if submission.ground_truth is None:
            return None
        return grade(submission.solution, submission.ground_truth, self.method)

    def _submission(self, instance_id: str) -> _Submission:
        try:
            return self._submissions[instance_id]
        except KeyError:
            raise LookupError(f"{self.name} knows no trajectory {instance_id!r}: create() was not called, or release() was") from None
