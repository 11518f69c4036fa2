"""verl's rollout dumps (`trainer.rollout_data_dir`), JSON Lines, a file for each step.

Source: verl 0.6.1, trainer/ppo/ray_trainer.py, `_dump_generations`. A line has `input` and
`output`, decoded with `skip_special_tokens=True`, `gts`, `score`, `step` and what the reward
function added. It has no ids, mask, log-probs or turns: the record holds two given messages and a
reward.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from conversations.errors import ImportFileError
from conversations.imports.blank import blank, reward_fields
from conversations.imports.files import SourceDocument
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory

WARNING = (
    "imported from a verl rollout dump, which is text without special tokens: no token ids, mask, "
    "log-probs or turns; the two messages are all that went in and all that came out, tool "
    "responses included; stop_reason and started_at are not known"
)
_KEYS = ("input", "output", "gts", "score", "step")


class VerlReader:
    """Reads lines. The samples of one prompt in one step are a group, in order."""

    def __init__(self, template: ChatTemplate | None) -> None:
        if template is not None:
            raise ImportFileError(
                "--tokenizer: a verl dump's text has no special tokens, "
                "so no tokenizer can tell its ids"
            )
        self._samples: Counter[str] = Counter()

    def __call__(self, document: SourceDocument) -> Trajectory:
        row = document.value
        texts = {name: _text(row, name) for name in ("input", "output")}
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ImportFileError(f"step is {step!r:.60}, expected an integer")
        reward = reward_fields(row.get("score"), "score")
        prompt = texts["input"].encode(errors="surrogatepass")
        task_id = f"step{step}-{hashlib.sha256(prompt).hexdigest()[:16]}"
        record = {
            **blank(task_id, self._samples[task_id]),
            **reward,
            "warnings": [{"kind": "imported", "text": WARNING}],
            "engine": {"name": "verl"},
        }
        self._samples[task_id] += 1
        record["messages"] = [
            {"role": "user", "content": texts["input"]},
            {"role": "assistant", "content": texts["output"], "raw": None},
        ]
        record |= {
            "ground_truth": row.get("gts"),
            "extra": {"step": step, **{key: row[key] for key in row if key not in _KEYS}},
        }
        return Trajectory.from_record(record)


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ImportFileError(
            f"{name} is {value!r:.60}, expected a text; is this a file of trainer.rollout_data_dir?"
        )
    return value
