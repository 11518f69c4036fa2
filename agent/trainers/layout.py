"""verl's batches: the rows of a `DataProto` as tasks, trajectories as the arrays and columns of
another.

Invariant: the batch that goes back has one row for each row that came in, in its order. A row that
cannot be trained on (cut off by over-sampling, or failed because of infrastructure) is in it, with
response mask 0 throughout.

Layout of verl 0.6.1's `SGLangRollout._req_level_generate_sequences`; `conversations.padding` says
it field by field.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import TaskError
from agent.loop.tasks import Task, row_hash, row_task
from agent.loop.users import Interactions
from conversations.errors import MessageError
from conversations.images.pixels import joined_pixels, pixels_of
from conversations.images.reading import Picture
from conversations.messages import content_text
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
            if images := _images(columns, index):
                row["images"] = images
            task = row_task({"prompt": messages, **row}, _name(messages, images))
            if interactions and task.interaction_kwargs:
                interactions.chosen(task.interaction_kwargs)
        except (TaskError, MessageError, TypeError, ValueError) as error:
            raise TaskError(f"row {index} of the batch: {error}") from error
        pairs.append((task, samples[task.id]))
        samples[task.id] += 1
    return pairs


def _images(columns: Mapping[str, Any], index: int) -> list[Any]:
    """The images of a row of verl 0.6.1's dataset, for its messages' image parts in order."""
    seen = columns["multi_modal_data"][index] if "multi_modal_data" in columns else None
    images = seen.get("image") or seen.get("images") if isinstance(seen, Mapping) else None
    return list(images or ())


def _name(messages: Any, images: list[Any]) -> str:
    """The hash of a prompt and its images, which verl 0.8 and 0.9 have in its messages."""
    plain = _hashable(messages)
    return row_hash([plain, _hashable(images)] if images else plain)


def _hashable(value: Any) -> Any:
    """A value as JSON: bytes and PIL images by a hash of theirs."""
    if isinstance(value, Mapping):
        return {key: _hashable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hashable(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes") and hasattr(value, "size"):
        return [list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    return value


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
    `merge_size` is the image processor's, None for a model that sees none.
    """

    prompt_length: int
    response_length: int
    pad_id: int
    logprobs: bool
    merge_size: int | None = None


def batch_arrays(trajectories: Sequence[Trajectory], shape: Shape) -> dict[str, Any]:
    """The trajectories, in order, as numpy arrays [B, ...] by name.

    A trajectory that was cut off (`cancelled`) is padding, as verl has it.
    """
    arrays = padded_batch(
        [_trainable(one, shape) for one in trajectories],
        prompt_length=shape.prompt_length,
        response_length=shape.response_length,
        pad_id=shape.pad_id,
        logprobs=shape.logprobs,
        merge_size=shape.merge_size,
    )
    for index, one in enumerate(trajectories):
        if one.stop_reason == "cancelled":
            arrays["attention_mask"][index] = 0
    return arrays


def seen_inputs(
    trajectories: Sequence[Trajectory],
    shape: Shape,
    pictures: Mapping[str, Picture],
    image_processor: Any,
) -> Any:
    """verl's `multi_modal_inputs`: `pixel_values` and `image_grid_thw` of each row's images, {} for
    a row without any.

    `image_processor` is the trainer's own. An image of several rows is processed once.
    """
    made: dict[str, dict[str, Any]] = {}

    def of(sha256: str) -> dict[str, Any]:
        if sha256 not in made:
            made[sha256] = pixels_of(pictures[sha256], image_processor)
        return made[sha256]

    return _column(
        joined_pixels([of(image["sha256"]) for image in _trainable(one, shape).images])
        for one in trajectories
    )


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
    content = message.get("raw") or content_text(message["content"])
    return {"role": message["role"], "content": content}


def without_response(one: Trajectory) -> Trajectory:
    """The trajectory's prompt alone, with its images."""
    images = [image for image in one.images if image["end"] <= len(one.prompt_ids)]
    return replace(one, response_ids=[], response_mask=[], response_logprobs=[], images=images)


def _trainable(one: Trajectory, shape: Shape) -> Trajectory:
    """The trajectory as a trainer may see it.

    Rows of all ranks must be equally long, so a prompt over the budget keeps only its end; nothing
    was sampled after it. A model that sees is shown nothing of a response that failed: it may hold
    a placeholder that no image stands for.
    """
    prompt_length = shape.prompt_length
    if len(one.prompt_ids) > prompt_length:
        one = replace(one, prompt_ids=_end_of(one, prompt_length), images=[])
    if one.stop_reason == "cancelled" or (has_failed(one) and shape.merge_size is not None):
        return without_response(one)
    if has_failed(one):
        return replace(one, response_mask=[0] * len(one.response_ids))
    return one


def _end_of(one: Trajectory, length: int) -> list[int]:
    """The last tokens of a prompt that is too long. Of images, whose tokens mean nothing without
    their pixels, the prompt's first token stands there: an image must be there whole or not at all.
    """
    ids = list(one.prompt_ids)
    for image in one.images:
        ids[image["start"] : image["end"]] = [ids[0]] * (image["end"] - image["start"])
    return ids[-length:]


def _reward_scores(one: Trajectory) -> dict[str, Any]:
    return {} if one.stop_reason == "cancelled" else {"user_turn_rewards": [], **one.reward_parts}


def _column(values: Iterable[Any]) -> Any:
    """An object array of one value a row, whatever the values look like."""
    import numpy as np

    listed = list(values)
    column = np.empty(len(listed), dtype=object)
    column[:] = listed
    return column
