"""Trajectories as the padded arrays of a verl batch.

The layout is that of `SGLangRollout.generate_sequences` in verl 0.6.1:

    prompts            [B, P] int64   left-padded with `pad_id`; P is `prompt_length` or longer
    responses          [B, R] int64   right-padded with `pad_id`; R likewise
    response_mask      [B, R] int64   1 where the engine sampled the token
    input_ids          [B, P + R]     prompts and responses side by side
    attention_mask     [B, P + R]     0 where padded
    position_ids       [B, P + R]     counted from 0 at the first real token, 0 where padded
                       [B, 4, P + R]  of models that see: text, time, height, width, 1 where padded,
                                      as verl's dataset and agent loop have them
    rollout_log_probs  [B, R] float32 the engine's log-probs, 0 where nothing was sampled

P and R grow to the longest sequence. Padding exists only here and only for verl: everywhere else a
token sequence has its own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conversations.images.positions import four_rows, image_positions
from conversations.trajectory import Trajectory


def placed_grids(one: Trajectory) -> list[tuple[int, list[int]]]:
    """(first token, grid) of a trajectory's images, in order."""
    return [(image["start"], image["grid"]) for image in one.images]


def padded_batch(
    trajectories: Sequence[Trajectory],
    *,
    prompt_length: int,
    response_length: int,
    pad_id: int,
    logprobs: bool = True,
    merge_size: int | None = None,
) -> dict[str, Any]:
    """The numpy arrays above, by name; `rollout_log_probs` only with `logprobs`.

    `merge_size` is that of the model's image processor, None for a model that sees no images.
    """
    import numpy as np

    prompt_length = max([prompt_length, *(len(one.prompt_ids) for one in trajectories)])
    response_length = max([response_length, *(len(one.response_ids) for one in trajectories)])
    count, total = len(trajectories), prompt_length + response_length
    input_ids = np.full((count, total), pad_id, dtype=np.int64)
    attention_mask, position_ids = np.zeros((2, count, total), dtype=np.int64)
    mask = np.zeros((count, response_length), dtype=np.int64)
    values = np.zeros((count, response_length), dtype=np.float32)
    seen: list[Any] = []
    for row, one in enumerate(trajectories):
        start, end = prompt_length - len(one.prompt_ids), prompt_length + len(one.response_ids)
        input_ids[row, start:end] = [*one.prompt_ids, *one.response_ids]
        attention_mask[row, start:end] = 1
        position_ids[row, start:end] = np.arange(end - start)
        if merge_size is not None:
            rows = image_positions(end - start, placed_grids(one), merge_size)
            seen.append(four_rows(attention_mask[row], rows))
        mask[row, : len(one.response_mask)] = one.response_mask
        values[row, : len(one.response_logprobs)] = [
            value or 0.0 for value in one.response_logprobs
        ]
    return {
        "prompts": input_ids[:, :prompt_length].copy(),
        "responses": input_ids[:, prompt_length:].copy(),
        "response_mask": mask,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids if merge_size is None else np.stack(seen),
        **({"rollout_log_probs": values} if logprobs else {}),
    }
