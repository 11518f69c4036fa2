"""Which turns of a record an engine can score, and why not the others.

Invariant: a record may come from anybody. A turn whose place or log-probs cannot be true is left
out as damaged, and every turn that is left out is counted under its reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from agent.model.base import model_name
from conversations.trajectory import Trajectory, Turn

SGLANG = frozenset({"sglang", "sglang_server"})
"""Names of engines that run the same program."""
GREEDY = 1e-6
"""SGLang samples greedily below this temperature, and then reports log-probs at temperature 1."""
UNSCORABLE = (
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "regex",
    "json_schema",
    "ebnf",
    "structural_tag",
    "custom_params",
)
"""Sampling params that change the distribution in a way that a prefill does not repeat."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`turns` are the numbers of those to score, `left_out` counts the others by reason.

    `temperature` is that of the recorded log-probs, 1 if they were sampled greedily.
    """

    turns: list[int] = field(default_factory=list)
    temperature: float = 1.0
    is_greedy: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


def plan_of(record: Trajectory, engine: Mapping[str, Any]) -> Plan:
    """What of `record`'s own turns the engine that describes itself as `engine` can score."""
    if reason := (
        other_engine(record.engine, engine) or unscorable(record.sampling) or _with_images(record)
    ):
        return Plan(left_out=Counter({reason: len(record.turns)}))
    temperature = record.sampling.get("temperature", 1.0)
    is_greedy = temperature < GREEDY
    plan = Plan(temperature=1.0 if is_greedy else temperature, is_greedy=is_greedy)
    for number, turn in enumerate(record.turns):
        if reason := _left_out(record, number, turn):
            plan.left_out[reason] += 1
        elif turn.end > turn.start:
            plan.turns.append(number)
    return plan


def other_engine(recorded: Any, engine: Mapping[str, Any]) -> str:
    """Why the record's engine is not this one; empty if it is, or may be."""
    if not isinstance(recorded, Mapping):
        return "damaged"
    name, other = recorded.get("name"), engine.get("name")
    if name != other and not SGLANG.issuperset((str(name), str(other))):
        return f"sampled by the engine {name}"
    model, other_model = _model(recorded), _model(engine)
    if model and other_model and model != other_model:
        return f"sampled by the model {model}"
    return ""


def _model(engine: Mapping[str, Any]) -> str:
    """A model's own name: servers report a path, which differs between machines."""
    reported = str(engine.get("model") or engine.get("model_path") or "")
    return PurePath(model_name(Path(reported))).name


def unscorable(sampling: Any) -> str:
    """Why log-probs of tokens sampled so cannot be computed again; empty if they can."""
    if not isinstance(sampling, Mapping):
        return "damaged"
    temperature = sampling.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        return "damaged"
    if not 0.0 <= temperature < math.inf:
        return "damaged"
    for key in UNSCORABLE:
        if sampling.get(key):
            return f"sampled with {key}"
    if sampling.get("repetition_penalty", 1.0) != 1.0:
        return "sampled with repetition_penalty"
    is_filtered = sampling.get("top_p", 1.0) != 1.0 or sampling.get("top_k", -1) != -1
    if sampling.get("min_p") and is_filtered:  # SGLang's log-probs are then those after top_p
        return "sampled with min_p and another filter"
    # SGLang scales these log-probs only if a request beside them is not greedy.
    if sampling.get("top_k") == 1 and temperature not in (0, 1):
        return "sampled with top_k 1 and a temperature"
    return ""


def _with_images(record: Trajectory) -> str:
    """Why its ids are not what the model saw; empty if they are: a request is ids alone."""
    return "of a record with images" if record.images else ""


def _left_out(record: Trajectory, number: int, turn: Turn) -> str:
    if not _is_sound(record, turn):
        return "damaged"
    if turn.resumed:
        return "resumed, perhaps under other weights"
    kept = (record.parent or {}).get("turn")
    if isinstance(kept, int) and number < kept:
        return "of the run that was forked"
    values = record.response_logprobs[_offset(record, turn.start) : _offset(record, turn.end)]
    if any(value is None for value in values):
        return "without log-probs"
    return "" if all(map(_is_number, values)) else "damaged"


def _offset(record: Trajectory, position: int) -> int:
    return position - len(record.prompt_ids)


def _is_sound(record: Trajectory, turn: Turn) -> bool:
    first = max(1, len(record.prompt_ids))
    end = min(len(record.response_ids), len(record.response_logprobs)) + len(record.prompt_ids)
    ids = (*record.prompt_ids, *record.response_ids)
    spans = all(type(place) is int for place in (turn.start, turn.end))
    return (
        spans
        and first <= turn.start <= turn.end <= end
        and all(type(token) is int and token >= 0 for token in ids)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
