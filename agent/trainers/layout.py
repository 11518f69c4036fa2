"""verl's batches: the rows of a `DataProto` as tasks, trajectories as the arrays and columns of
another.

Invariant: the batch that goes back has one row for each row that came in, in its order. A row that
cannot be trained on (cut off by over-sampling, or failed because of infrastructure) is in it, with
response mask 0 throughout.

Layout of verl 0.6.1's `SGLangRollout._req_level_generate_sequences`; `conversations.padding` says
it field by field.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import TaskError
from agent.loop.tasks import Task, row_hash, row_task
from agent.loop.users import Interactions
from conversations.errors import MessageError
from conversations.padding import padded_batch
from conversations.trajectory import Trajectory

ROW_KEYS = ("tools_kwargs", "interaction_kwargs", "data_source", "reward_model", "extra_info")
"""A row's columns beside `raw_prompt`.

A trainer strips the last three before a rollout sees them.
"""


def batch_tasks(
    columns: Mapping[str, Any], interactions: Interactions | None = None
) -> list[tuple[Task, int]]:
    """(task, sample) of each row of a `non_tensor_batch`.

    Rows with the same `raw_prompt` are samples of one task, whose id is the hash of that prompt.
    The rows that verl repeats to fill up a batch look like any others, so they are samples too.
    Raises TaskError, naming the row, if a row is not a task or chooses an interaction that
    `interactions` does not have.
    """
    if "raw_prompt" not in columns:
        raise TaskError("the batch has no raw_prompt: set data.return_raw_chat=True")
    samples: Counter[str] = Counter()
    pairs = []
    for index, raw_prompt in enumerate(columns["raw_prompt"]):
        try:
            messages = _plain(raw_prompt)
            row = {
                key: value
                for key in ROW_KEYS
                if key in columns and (value := _plain(columns[key][index])) is not None
            }
            task = row_task({"prompt": messages, **row}, row_hash(messages))
            if interactions and task.interaction_kwargs:
                interactions.chosen(task.interaction_kwargs)
        except (TaskError, MessageError, TypeError, ValueError) as error:
            raise TaskError(f"row {index} of the batch: {error}") from error
        pairs.append((task, samples[task.id]))
        samples[task.id] += 1
    return pairs


def _plain(value: Any) -> Any:
    """The value in Python's own types, without null keys: pandas leaves numpy's in rows."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def has_failed(one: Trajectory) -> bool:
    """Whether a conversation has no reward because infrastructure or its template failed."""
    return one.infra_error or one.stop_reason == "engine_error"


def why_not_trained(one: Trajectory) -> str | None:
    """Why a trajectory cannot be trained on; None if it can, or if it was cut off on purpose."""
    if has_failed(one):
        return one.error or "a tool's backend failed"
    if one.stop_reason == "prompt_too_long":
        return (
            f"the prompt of task {one.task_id} has {len(one.prompt_ids)} tokens, "
            "more than rollout.prompt_length"
        )
    return None


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arrays of a batch depend on beside the trajectories.

    Lengths are the rollout config's, in tokens. `logprobs`: whether the batch has them.
    """

    prompt_length: int
    response_length: int
    pad_id: int
    logprobs: bool


def batch_arrays(trajectories: Sequence[Trajectory], shape: Shape) -> dict[str, Any]:
    """The trajectories, in order, as numpy arrays [B, ...] by name.

    A trajectory that was cut off (`cancelled`) is padding, as verl has it.
    """
    arrays = padded_batch(
        [_trainable(one, shape.prompt_length) for one in trajectories],
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
    """What goes back beside the arrays, one object a row.

    `messages`: role and content of each. `reward_scores`: the reward parts. `request_id`: a fresh
    one.
    """
    import numpy as np

    return {
        "messages": _column([_spoken(message) for message in one.messages] for one in trajectories),
        "reward_scores": _column(_reward_scores(one) for one in trajectories),
        "request_id": np.array([str(uuid.uuid4()) for _ in trajectories], dtype=str),
    }


def _spoken(message: Mapping[str, Any]) -> dict[str, str]:
    """A message with nothing but role and content: a sampled turn as its raw text, so no call is
    lost.
    """
    return {"role": message["role"], "content": message.get("raw") or message["content"] or ""}


def _trainable(one: Trajectory, prompt_length: int) -> Trajectory:
    """The trajectory as a trainer may see it.

    Rows of all ranks must be equally long, so a prompt over the budget keeps only its end; nothing
    was sampled after it.
    """
    one = replace(one, prompt_ids=one.prompt_ids[-prompt_length:])
    if one.stop_reason == "cancelled":
        return replace(one, response_ids=[], response_mask=[], response_logprobs=[])
    if has_failed(one):
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
