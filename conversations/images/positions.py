"""The 3D positions (M-RoPE) of Qwen2-VL, Qwen2.5-VL and Qwen3-VL for text and images.

A text token's three positions are equal and count up. An image's tokens have the position of its
frame (always the first), row and column, all from where the text stood; the text after it continues
one above the highest. As `get_rope_index` of transformers 4.57.1 and of verl 0.6.1 computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PADDING = 1
"""What both write for positions that the attention mask leaves out."""


def image_positions(
    length: int, images: Sequence[tuple[int, Sequence[int]]], merge_size: int
) -> Any:
    """Positions [3, length], int64: rows are time, height, width.

    `images` are (index of the first token, grid in patches), in order.
    """
    import numpy as np

    positions = np.empty((3, length), dtype=np.int64)
    here, next_position = 0, 0
    for start, (frames, rows, columns) in images:
        positions[:, here:start] = np.arange(next_position, next_position + start - here)
        next_position += start - here
        shape = frames, rows // merge_size, columns // merge_size
        count = int(np.prod(shape))
        positions[:, start : start + count] = next_position + np.indices(shape).reshape(3, -1)
        next_position += max(shape)
        here = start + count
    positions[:, here:] = np.arange(next_position, next_position + length - here)
    return positions


def four_rows(mask: Any, rows: Any) -> Any:
    """[4, L]: the text's positions, then `rows` [3, valid tokens], at the places of `mask` [L].

    As verl's dataset and agent loop have it: the positions of padding are `PADDING`.
    """
    import numpy as np

    valid = np.asarray(mask, dtype=bool)
    whole = np.full((4, len(valid)), PADDING, dtype=np.int64)
    whole[0, valid] = np.arange(int(valid.sum()))
    whole[1:, valid] = rows
    return whole
