"""verl's batches: the rows of a `DataProto` as tasks, and trajectories as the arrays and columns of the one that goes back.

Invariant: the batch that comes back has one row for each row that went in, in its order. A row that cannot be trained
on (cut off by over-sampling, or failed by infrastructure) is there, with response mask 0 throughout.

Layout of verl 0.6.1's `SGLangRollout._req_level_generate_sequences`; `conversations.padding` says it field by field.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import TaskError
from agent.tasks import Task, row_hash, row_task, without_nulls
from conversations.errors import MessageError
from conversations.padding import padded_batch
from conversations.trajectory import Trajectory

ROW_KEYS = ("tools_kwargs", "interaction_kwargs", "data_source", "reward_model", "extra_info")
"""What a row may bring beside its `raw_prompt`; a trainer strips the last three before a rollout sees them."""


def batch_tasks(columns: Mapping[str, Any]) -> list[tuple[Task, int]]:
    """(task, sample) of each row of a `non_tensor_batch`. Rows with the same `raw_prompt` are samples of one task.

    A task's id is the hash of that. Raises TaskError for a row that is no task.
    """
    if "raw_prompt" not in columns:
        raise TaskError("the batch has no raw_prompt: set data.return_raw_chat=True")
    samples: Counter[str] = Counter()
    pairs = []
    for index, raw_prompt in enumerate(columns["raw_prompt"]):
        row = {key: without_nulls(columns[key][index]) for key in ROW_KEYS if key in columns and columns[key][index] is not None}
        messages = without_nulls(list(raw_prompt))
        try:
            name = row_hash(messages)
            task = row_task({"prompt": messages, **row}, name)
        except (TaskError, MessageError, TypeError, ValueError) as error:
            raise TaskError(f"row {index} of the batch: {error}") from error
        pairs.append((task, samples[name]))
        samples[name] += 1
    return pairs


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arrays of a batch depend on beside the trajectories; lengths are the rollout config's."""

    prompt_length: int
    response_length: int
    pad_id: int
    logprobs: bool


def batch_arrays(trajectories: Sequence[Trajectory], shape: Shape) -> dict[str, Any]:
    """The trajectories, in order, as numpy arrays [B, ...] by name. What was cut off (`cancelled`) is padding, as verl has it."""
    arrays = padded_batch(
        [_trainable(one) for one in trajectories],
        prompt_length=shape.prompt_length,
        response_length=shape.response_length,
        pad_id=shape.pad_id,
        logprobs=shape.logprobs,
    )
    for index, one in enumerate(trajectories):
        if one.stop_reason == "cancelled":
            arrays["attention_mask"][index] = 0
    return arrays


def batch_columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What goes back beside the arrays, one object a row: messages (plain dicts), reward parts, a fresh request id."""
    import numpy as np

    return {
        "messages": _column(one.messages for one in trajectories),
        "reward_scores": _column(_reward_scores(one) for one in trajectories),
        "request_id": np.array([str(uuid.uuid4()) for _ in trajectories]),
    }


def _trainable(one: Trajectory) -> Trajectory:
    if one.stop_reason == "cancelled":
        return replace(one, response_ids=[], response_mask=[], response_logprobs=[])
    if one.infra_error:
        return replace(one, response_mask=[0] * len(one.response_ids))
    return one


def _reward_scores(one: Trajectory) -> dict[str, Any]:
    return {} if one.stop_reason == "cancelled" else {"user_turn_rewards": [], **one.reward_parts}


def _column(values: Iterable[Any]) -> Any:
    """An object array of one value a row, whatever the values look like."""
    import numpy as np

    listed = list(values)
    column = np.empty(len(listed), dtype=object)
    column[:] = listed
    return column
