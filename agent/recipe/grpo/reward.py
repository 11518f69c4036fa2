"""What a conversation of the recipe is worth: one rule for training, report and held-out figures.

An answer counts only if the model ends the conversation itself: without that, it pays to submit
again and again until the budget is used up (README.md shows a run). turntrace's loop says how a
conversation ended: `stop_reason` is `stop`. verl's own loop does not, so its text is asked, which
takes a last sentence that was cut off for an ending.

verl imports this file by its path and calls `compute_score` or `tools_score`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from conversations.trajectory import Trajectory
from tools.gsm8k import grade

ENDED = "stop"
"""The stop reason of a conversation that the model ended itself."""

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """1.0 if the last answer given to `calculate_answer` is right and the model ended, else 0.0.

    verl's naive reward manager calls it with these names.
    """
    kept = _kept(extra_info)
    ended = kept["stop_reason"] == ENDED if kept else _has_ended(solution_str)
    submitted = [answer for answer in map(_answer, _CALL.findall(solution_str)) if answer]
    right = float(grade(f"#### {submitted[-1]}", ground_truth)) if submitted else 0.0
    return right if ended else 0.0


def tools_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """The tools' own reward if the model ended, else 0.0. turntrace's loop alone records it."""
    kept = _kept(extra_info)
    if kept is None:
        raise ValueError("the tools' reward needs turntrace's agent loop: its extras are missing")
    return float(kept["reward"] or 0.0) if kept["stop_reason"] == ENDED else 0.0


def score_of(one: Trajectory, *, from_tools: bool) -> float | None:
    """A recorded conversation's score by the same rule; None if infrastructure failed it."""
    if one.infra_error:
        return None
    said = "\n".join(message["raw"] for message in one.messages if message.get("raw"))
    kept = {"stop_reason": one.stop_reason, "reward": one.reward}
    score = tools_score if from_tools else compute_score
    return score(str(one.data_source), said, str(one.ground_truth), {"extras": {"turntrace": kept}})


def _kept(extra_info: Any) -> Mapping[str, Any] | None:
    """What turntrace's agent loop says of the conversation; None of verl's own loop."""
    extras = extra_info.get("extras") if isinstance(extra_info, Mapping) else None
    return extras.get("turntrace") if isinstance(extras, Mapping) else None


def _has_ended(text: str) -> bool:
    """Whether the model's own words, without a call, follow the last tool's answer."""
    last = text.rpartition("</tool_response>")[2]
    return "<tool_call>" not in last and bool(last.replace("assistant", "", 1).strip())


def _answer(block: str) -> str | None:
    try:
        call = json.loads(block)
        if call["name"] != "calculate_answer":
            return None
        return str(call["arguments"]["answer"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
