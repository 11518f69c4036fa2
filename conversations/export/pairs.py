"""Preference pairs: the best and the worst sample of each group.

Their rewards must differ and their prompts must be equal. The texts are decoded from the ids, up to
the last sampled token, so they have the chat template and tools as the engine saw them. Neither TRL
nor OpenRLHF has a mask for a pair: a trainer counts the tool responses in a completion too, and
`verdict` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conversations.errors import ExportError
from conversations.export.formats import Row, Source
from conversations.export.text import TextView, TokensAndMask

FIELDS = {
    "prompt": "the text of the prompt's ids, with chat template and tools; "
    "do not apply a chat template again",
    "chosen, rejected": "the text of the best and of the worst response of the group, "
    "up to the last sampled token",
    "chosen_reward, rejected_reward": "the rewards of the two",
    "chosen_id, rejected_id, task_id": "the trajectories and their group in the run",
}


@dataclass(slots=True)
class _Extremes:
    """The best and the worst sample so far, the first of equals."""

    best: tuple[float, str]
    worst: tuple[float, str]

    def add(self, reward: float, trajectory_id: str) -> None:
        if reward > self.best[0]:
            self.best = (reward, trajectory_id)
        if reward < self.worst[0]:
            self.worst = (reward, trajectory_id)


def pairs(
    source: Source, retokenise: Callable[[str, str, TextView], TokensAndMask]
) -> Iterator[Row]:
    """One row for each group. `retokenise` tokenises prompt and completion as the consumer."""
    view = source.view
    if view.template is None:
        raise ExportError(f"{source.run.path}: pairs hold text, and {source.notes[-1]}")
    for task_id, extremes in _groups(source).items():
        (high, best), (low, worst) = extremes.best, extremes.worst
        chosen, rejected = (
            source.run.record(best, check=False),
            source.run.record(worst, check=False),
        )
        if high == low:
            source.leave_out("group without two rewards")
        elif chosen["prompt_ids"] != rejected["prompt_ids"]:
            source.leave_out("group with several prompts")
        else:
            yield _pair(source, task_id, chosen, rejected, retokenise)


def _groups(source: Source) -> dict[str, _Extremes]:
    groups: dict[str, _Extremes] = {}
    for record in source.with_ids():
        reward = record["reward"]
        if reward is None:
            source.leave_out("no reward")
        elif group := groups.get(record["task_id"]):
            group.add(reward, record["id"])
        else:
            groups[record["task_id"]] = _Extremes((reward, record["id"]), (reward, record["id"]))
    return groups


def _pair(
    source: Source,
    task_id: str,
    chosen: Any,
    rejected: Any,
    retokenise: Callable[[str, str, TextView], TokensAndMask],
) -> Row:
    view = source.view
    prompt = view.prompt(chosen)
    row: Row = {"prompt": prompt, "task_id": task_id}
    for name, record in (("chosen", chosen), ("rejected", rejected)):
        text = view.completion(record)
        source.fits(record, retokenise, prompt, text)
        row |= {name: text, f"{name}_reward": record["reward"], f"{name}_id": record["id"]}
    return row
