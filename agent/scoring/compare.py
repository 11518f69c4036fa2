"""Recorded log-probs beside an engine's: the differences of one record, and of a run.

The verdict has two rules. A token that was rewritten differs by far more than arithmetic does: no
token may differ by more than `LIMIT`. A wrong temperature or other weights move many tokens a
little: no more than `SHARE` of the tokens may differ by more than the bound.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.engines.scoring import Scores
from agent.scoring.plan import Plan
from agent.scoring.temperature import at_temperature
from conversations.trajectory import Trajectory

GPU_BOUND, CPU_BOUND = 0.05, 0.5
"""Of the difference of a token's log-probs, in nats, for bf16 engines.

On a GPU prefill and sampling differ by 2e-4 on average, by less than 6e-4 for 99% of the tokens, by
0.40 at most. On a CPU half the tokens differ by more than 0.01 to 0.03, one of ten by more than
0.1; 0.32 was the most of 523.
"""
LIMIT, SHARE = 2.0, 0.01
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
WORST = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """One sequence of a record beside an engine's scores.

    `differences` has a value for each response token: recorded log-prob minus the engine's, None if
    it was not scored. `gaps` has one for each token that was sampled greedily: how far its log-prob
    is below that of the likeliest token, 0 if it is that one. `widths` are those of the intervals
    that are compared if the temperature is not 1; see `temperature`. `turns` are the numbers of the
    scored ones, `left_out` counts the others by reason.
    """

    differences: list[float | None]
    gaps: list[float]
    widths: list[float]
    turns: list[int]
    left_out: Counter[str]


def compare_scores(record: Trajectory, plan: Plan, scores: Scores | None, first: int) -> Compared:
    """The record beside `scores`, which begin at position `first`; None if nothing was scored."""
    compared = Compared([None] * len(record.response_ids), [], [], [], Counter(plan.left_out))
    if scores is None:
        return compared
    for number in plan.turns:
        turn = record.turns[number]
        known = scores.weight_version is not None and turn.weight_version is not None
        if known and scores.weight_version != turn.weight_version:
            compared.left_out[f"sampled by the weights {turn.weight_version}"] += 1
            continue
        compared.turns.append(number)
        for position in range(turn.start, turn.end):
            _compare_token(record, plan, scores, position - first, position, compared)
    return compared


def _compare_token(
    record: Trajectory, plan: Plan, scores: Scores, place: int, position: int, compared: Compared
) -> None:
    index = position - len(record.prompt_ids)
    recorded = record.response_logprobs[index]
    assert recorded is not None  # a turn without log-probs is not in the plan
    logprob, likeliest = scores.logprobs[place], scores.likeliest[place]
    low, high = at_temperature(logprob, likeliest, plan.temperature)
    compared.differences[index] = recorded - min(max(recorded, low), high)
    if plan.temperature != 1.0:
        compared.widths.append(high - low)
    if plan.is_greedy:
        compared.gaps.append(max(0.0, likeliest[0] - logprob))


# ---------------------------------------------------------------------- a run


@dataclass(frozen=True, slots=True, order=True)
class WorstTurn:
    """The token of a turn that differs most: `size` nats, `difference` with its sign.

    `turn` counts the turns of `branch`, 0 being the trunk; `token` from the first prompt id.
    """

    size: float
    id: str
    branch: int
    turn: int
    token: int
    difference: float


@dataclass(slots=True)
class Spread:
    """How large values are: their number, quantiles, and how many are over the bound."""

    bound: float
    sizes: array[float] = field(default_factory=lambda: array("d"))

    def add(self, values: Iterable[float]) -> None:
        """Counts values by their size, whatever their sign."""
        self.sizes.extend(map(abs, values))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def over(self) -> int:
        """How many are over the bound."""
        return sum(size > self.bound for size in self.sizes)

    @property
    def share(self) -> float:
        """The share over the bound; 0 if there are no values."""
        return self.over / len(self) if self.sizes else 0.0

    @property
    def is_met(self) -> bool:
        """Whether the two rules hold; see the module."""
        return self.share <= SHARE and max(self.sizes, default=0.0) <= LIMIT

    def quantiles(self) -> dict[str, float | None]:
        """p50, p90, p99 and max: the smallest value that this share does not exceed."""
        ordered = sorted(self.sizes)
        if not ordered:
            return dict.fromkeys(QUANTILES)
        last = len(ordered) - 1
        return {
            name: ordered[min(last, math.ceil(share * len(ordered)) - 1)]
            for name, share in QUANTILES.items()
        }

    def as_json(self) -> dict[str, Any]:
        """The spread as one JSON object."""
        return {"tokens": len(self), **self.quantiles(), "over": self.over, "share": self.share}


class Comparison:
    """A run beside an engine's scores; `add` each record that was compared."""

    def __init__(self, engine: Mapping[str, Any], bound: float | None = None) -> None:
        """`bound` None: that of the engine's device."""
        default = CPU_BOUND if engine.get("device") == "cpu" else GPU_BOUND
        self.engine, self.bound = dict(engine), default if bound is None else bound
        self.differences, self.gaps = Spread(self.bound), Spread(self.bound)
        self.widths = Spread(self.bound)
        self.records = self.turns = 0
        self.left_out: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self._worst: list[WorstTurn] = []

    def add(self, parts: Sequence[tuple[Trajectory, Compared]]) -> None:
        """Counts one record: each of its sequences, the trunk first."""
        self.records += any(compared.turns for _, compared in parts)
        for branch, (sequence, compared) in enumerate(parts):
            self._add(branch, sequence, compared)

    def _add(self, branch: int, sequence: Trajectory, compared: Compared) -> None:
        self.turns += len(compared.turns)
        self.left_out += compared.left_out
        self.differences.add(value for value in compared.differences if value is not None)
        self.gaps.add(compared.gaps)
        self.widths.add(compared.widths)
        for number in compared.turns:
            worst = _worst_of(sequence, branch, number, compared.differences)
            heapq.heappush(self._worst, worst)
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)

    def fail(self, name: str, error: str) -> None:
        """Counts a record that could not be read or scored."""
        self.failed[name] = error

    @property
    def worst(self) -> list[WorstTurn]:
        """The turns that differ most, the worst first."""
        return sorted(self._worst, reverse=True)

    @property
    def is_met(self) -> bool:
        """Whether tokens were scored, no record failed, and the bound is met."""
        met = self.differences.is_met and self.gaps.is_met
        return met and not self.failed and len(self.differences) > 0

    def as_json(self) -> dict[str, Any]:
        """The comparison as one JSON object."""
        return {
            "ok": self.is_met,
            "engine": self.engine,
            "bound": self.bound,
            "allowed_share": SHARE,
            "limit": LIMIT,
            "records": self.records,
            "turns": self.turns,
            "differences": self.differences.as_json(),
            "greedy_gaps": self.gaps.as_json() if self.gaps else None,
            "loosely_judged": self.widths.over,
            "left_out": dict(self.left_out),
            "failed": self.failed,
            "worst": [
                {
                    "id": one.id,
                    "branch": one.branch,
                    "turn": one.turn,
                    "token": one.token,
                    "difference": one.difference,
                }
                for one in self.worst
            ],
        }


def _worst_of(
    record: Trajectory, branch: int, number: int, differences: list[float | None]
) -> WorstTurn:
    turn, before = record.turns[number], len(record.prompt_ids)
    size, token = max(
        (abs(differences[position - before] or 0.0), position)
        for position in range(turn.start, turn.end)
    )
    difference = differences[token - before] or 0.0
    return WorstTurn(size, record.id, branch, number, token, difference)
