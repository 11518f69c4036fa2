"""GSM8K answers, graded as verl 0.6.1 grades them.

Source: `verl/utils/reward_score/gsm8k.py`, `verl/tools/gsm8k_tool.py`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import pydantic

from tools.answer import AnswerTool
from tools.policy import read_own
from tools.reading import STRICT

Method = Literal["flexible", "strict"]

# The answer stands at the end: verl reads the last 300 characters only, and so do we.
CLIP_CHARS = 300

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"(-?[0-9.,]+)")


def extract_answer(text: str, method: Method = "flexible") -> str | None:
    """The answer in a solution: after the last `#### ` (strict), or the last number (flexible).

    None if there is none.
    """
    text = text[-CLIP_CHARS:]
    if method == "strict":
        marked = _STRICT.findall(text)
        return marked[-1].replace(",", "") if marked else None
    numbers: list[str] = _NUMBER.findall(text)
    if not numbers:
        return None
    # verl takes the first match if each of them is a lone full stop.
    return next((number for number in reversed(numbers) if number != "."), numbers[0])


def grade(text: str, ground_truth: str, method: Method = "flexible") -> float:
    """1.0 for the right answer, 0.0 for a wrong one, the integer 0 for none.

    verl's reply to the model differs between 0.0 and 0.
    """
    answer = extract_answer(text, method)
    if answer is None:
        return 0
    return 1.0 if answer == ground_truth else 0.0


class Gsm8kConfig(pydantic.BaseModel):
    """The tool's own keys of `config`."""

    model_config = STRICT

    method: Method = "flexible"


class Gsm8kTool(AnswerTool):
    """The tool's name is the schema's: `calculate_answer`, `calc_gsm8k_reward`, any.

    config: `method`, either `flexible` (the default, as in verl) or `strict`.
    """

    config_keys = frozenset(Gsm8kConfig.model_fields)

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self.method: Method = read_own(Gsm8kConfig, config).method

    async def grade(self, answer: str, ground_truth: str) -> tuple[float, dict[str, Any]]:
        return grade(
            answer if answer.startswith("#### ") else f"#### {answer}", ground_truth, self.method
        ), {}
