"""Group statistics: how often the samples of a task pass, and how their rewards spread.

A group is the samples of one task. A sample counts if it has a reward; infrastructure failures have
none. pass@k is the unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, equation 1), averaged
over the groups with at least k samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

PASS_REWARD = 1.0
"""A sample passes with at least this reward."""


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The estimated probability that at least one of `k` samples passes, `passed` of `n` did; k <=
    n.
    """
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


@dataclass(slots=True)
class Statistics:
    """Counters over trajectories, filled by `add`. Memory is one number a sample."""

    pass_reward: float = PASS_REWARD
    trajectories: int = 0
    infra_errors: int = 0
    without_reward: int = 0
    turns: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    other_tokens: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    branches: Counter[str] = field(default_factory=Counter)
    stop_reasons: Counter[str] = field(default_factory=Counter)
    data_sources: Counter[str] = field(default_factory=Counter)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    advantages: list[float] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts one record."""
        self.trajectories += 1
        for part in (record, *record["branches"]):
            sampled = sum(part["response_mask"])
            self.turns += len(part["turns"])
            self.prompt_tokens += len(part["prompt_ids"])
            self.sampled_tokens += sampled
            self.other_tokens += len(part["response_ids"]) - sampled
            self.calls.update(call["status"] for call in part["tool_calls"])
        self.branches.update(branch["reason"] for branch in record["branches"])
        self.stop_reasons[record["stop_reason"]] += 1
        self.data_sources[str(record["data_source"])] += 1
        self.add_reward(record)

    def add_reward(self, record: Mapping[str, Any]) -> None:
        """Counts the reward alone."""
        if record["infra_error"]:
            self.infra_errors += 1
        elif record["reward"] is None:
            self.without_reward += 1
        else:
            self.rewards.setdefault(record["task_id"], []).append(record["reward"])

    def add_advantage(self, value: float | None) -> None:
        """Counts a trajectory's saved advantage, if it has one."""
        if value is not None:
            self.advantages.append(value)

    def passed(self, task_id: str) -> tuple[int, int]:
        """The number of a task's samples that passed, and the number that have a reward."""
        rewards = self.rewards.get(task_id, [])
        return sum(reward >= self.pass_reward for reward in rewards), len(rewards)

    def is_mixed(self, task_id: str) -> bool:
        """Whether a task's rewards differ: only then does a group-relative advantage learn from
        them.
        """
        return len(set(self.rewards.get(task_id, []))) > 1

    def reward_mean(self) -> float | None:
        """The mean over all samples, None if none has a reward."""
        return fmean(self._all()) if self.rewards else None

    def reward_std(self) -> float | None:
        """The standard deviation over all samples, of the population."""
        return pstdev(self._all()) if self.rewards else None

    def group_std(self) -> float | None:
        """The mean over groups of the standard deviation within a group."""
        return fmean(pstdev(rewards) for rewards in self.rewards.values()) if self.rewards else None

    def pass_at(self) -> dict[int, tuple[float, int]]:
        """pass@k for k = 1, 2, 4, ... up to the largest group, with the number of groups of k
        samples.
        """
        counted = [(n, passed) for passed, n in map(self.passed, self.rewards)]
        largest = max((n for n, _ in counted), default=0)
        ks = [1 << power for power in range(largest.bit_length())]
        return {k: self._mean_pass_at(counted, k) for k in ks}

    def _mean_pass_at(self, counted: list[tuple[int, int]], k: int) -> tuple[float, int]:
        enough = [pass_at_k(n, passed, k) for n, passed in counted if n >= k]
        return fmean(enough), len(enough)

    def _all(self) -> list[float]:
        return [reward for rewards in self.rewards.values() for reward in rewards]

    def table(self) -> dict[str, str]:
        """The figures by name, as text, in the order to show them."""
        shares = list(map(self.passed, self.rewards))
        calls = self.calls.total()
        return {
            "trajectories": str(self.trajectories),
            "infrastructure errors": str(self.infra_errors),
            "without a reward": str(self.without_reward),
            "groups with rewards": str(len(self.rewards)),
            "  all samples pass": str(sum(passed == n for passed, n in shares)),
            "  no sample passes": str(sum(passed == 0 for passed, _ in shares)),
            "  rewards differ": str(sum(map(self.is_mixed, self.rewards))),
            "reward, mean": _number(self.reward_mean()),
            "reward, std": _number(self.reward_std()),
            "reward, std in a group": _number(self.group_std()),
            **self._advantages(),
            **{
                f"pass@{k}": f"{_number(rate)} over {groups} groups"
                for k, (rate, groups) in self.pass_at().items()
            },
            "turns, mean": _number(self._per_trajectory(self.turns)),
            "prompt tokens, mean": _number(self._per_trajectory(self.prompt_tokens)),
            "sampled tokens, mean": _number(self._per_trajectory(self.sampled_tokens)),
            "tool and template tokens, mean": _number(self._per_trajectory(self.other_tokens)),
            "tool calls": str(calls),
            **{f"  {status} call": str(count) for status, count in self.calls.most_common()},
            **{f"branch, {reason}": str(n) for reason, n in self.branches.most_common()},
            **{
                f"stop reason {reason}": str(count)
                for reason, count in self.stop_reasons.most_common()
            },
        }

    def _advantages(self) -> dict[str, str]:
        """Nothing if the run has none."""
        if not self.advantages:
            return {}
        size = fmean(map(abs, self.advantages))
        zero = sum(value == 0 for value in self.advantages)
        return {"advantages": f"{len(self.advantages)}, mean size {size:.4g}, {zero} are 0"}

    def _per_trajectory(self, total: int) -> float | None:
        return total / self.trajectories if self.trajectories else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
