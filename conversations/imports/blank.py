"""A record of which nothing is known yet, and how the parts that no source tells are said to be missing."""

from __future__ import annotations

import math
from typing import Any

from conversations.errors import ImportFileError

EPOCH = "1970-01-01T00:00:00+00:00"
"""`started_at` where the source has no time."""


def blank(task_id: str, sample: int) -> dict[str, Any]:
    """The fields of a record without tokens, messages and reward."""
    return {
        "id": f"{task_id}-{sample}", "task_id": task_id, "sample": sample,
        "prompt_ids": [], "response_ids": [], "response_mask": [], "response_logprobs": [], "segments": [], "turns": [],
        "messages": [], "tool_calls": [], "tools": [], "stop_reason": "stop", "num_turns": 0, "infra_error": False, "error": None,
        "warnings": [], "reward": None, "reward_parts": {}, "ground_truth": None, "data_source": None, "extra": None, "engine": {},
        "sampling": {}, "parent": None, "started_at": EPOCH, "wall_s": 0.0, "branches": [],
    }  # fmt: skip


def reward_fields(value: Any, what: str) -> dict[str, Any]:
    """`reward` and `reward_parts` of a number; of null none. Raises ImportFileError for anything else."""
    if value is None:
        return {"reward": None, "reward_parts": {}}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ImportFileError(f"{what} is {value!r:.60}, expected a finite number")
    return {"reward": float(value), "reward_parts": {"imported": float(value)}}
