"""The pixels that a vision tower is given: what transformers' image processor makes of a picture.

Only trainers, and the engines that cannot make them themselves, need them: they are computed once
an image, never kept in a record, and follow from the picture and the processor's settings.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from conversations.errors import ImageError
from conversations.images.processor import ImageProcessor
from conversations.images.reading import Picture


def slow_processor(processor: ImageProcessor) -> Any:
    """transformers' Qwen2VLImageProcessor, which needs Pillow and numpy alone (no torchvision).

    transformers 5 calls it Qwen2VLImageProcessorPil. The sizes are given explicitly: the class
    ignores `size` (4.57.1).
    """
    image_processor = _without_torchvision()
    not_arguments = ("size", "image_processor_type", "processor_class", "image_processor")
    given = {key: value for key, value in processor.settings.items() if key not in not_arguments}
    given |= {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
    return image_processor(**given)


def _without_torchvision() -> Any:
    module = "transformers.models.qwen2_vl.image_processing"
    if importlib.util.find_spec(f"{module}_pil_qwen2_vl"):
        return importlib.import_module(f"{module}_pil_qwen2_vl").Qwen2VLImageProcessorPil
    return importlib.import_module(f"{module}_qwen2_vl").Qwen2VLImageProcessor


def pixels_of(picture: Picture, image_processor: Any) -> dict[str, Any]:
    """`pixel_values` [patches, values] float32 and `image_grid_thw` [1, 3] of one picture.

    `image_processor` is transformers' own, of the model. Takes some 10 ms: call it in a thread.
    Raises ImageError if the file cannot be decoded.
    """
    try:
        image = picture.image()
    except Exception as error:  # a damaged file of a run that came from elsewhere
        raise ImageError(f"the image {picture.sha256[:16]} is damaged: {error}") from error
    made = image_processor(images=[image], return_tensors="pt")
    return {key: made[key] for key in ("pixel_values", "image_grid_thw")}


def joined_pixels(pixels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those of several pictures as one, in order: verl's `multi_modal_inputs`."""
    import torch

    if not pixels:
        return {}
    return {key: torch.cat([one[key] for one in pixels]) for key in pixels[0]}
