"""verl's reward function for the recipe: what the last submitted answer is worth.

An answer counts only if the model ends the conversation itself: without that, it pays to submit
again and again until the budget is used up (README.md shows a run). It reads the decoded response,
so it scores turntrace's conversations and those of verl's own loop alike. verl imports this file by
its path.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tools.gsm8k import grade

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """1.0 if the last answer given to `calculate_answer` is right and the model ended, else 0.0.

    verl's naive reward manager calls it with these names.
    """
    if not _has_ended(solution_str):
        return 0.0
    submitted = [answer for answer in map(_answer, _CALL.findall(solution_str)) if answer]
    return float(grade(f"#### {submitted[-1]}", ground_truth)) if submitted else 0.0


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
