"""Zooms in on a region of an image, as verl 0.6.1's `ImageZoomInTool` does, without Ray.

Source: `verl/tools/image_zoom_in_tool.py` (boxes, texts, rewards) and `fetch_image` of
qwen_vl_utils 0.0.14, which it reads its image with: the image is resized to multiples of 28 first,
and boxes are in that picture's pixels.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence
from typing import Any

import pydantic

from tools.base import BaseTool, ToolResponse
from tools.extras import require
from tools.policy import Count, Seconds, read_own, with_rate_limit
from tools.reading import STRICT

MIN_DIMENSION = 28
"""Pixels: a smaller region is grown about its center to this."""
MAX_ASPECT = 100
SMALLEST_SIDE, LARGEST_SIDE = 1e-6, 1e9
"""Pixels: what is smaller is no region, what is larger no coordinate."""
FAILED = -0.05
"""The step reward of a box that cannot be cropped."""
MIN_TOKENS, MAX_TOKENS = 4, 16384
"""qwen_vl_utils' limits of a picture, in squares of its factor."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""


class ImageZoomConfig(pydantic.BaseModel):
    """The tool's own keys of `config`, verl's but for the last.

    num_workers: calls at a time
    timeout: seconds for one call
    enable_global_rate_limit: false: the dispatcher's `rate_limit` does not count
    image_patch_size: 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL: the image is resized to
        multiples of twice as many pixels, 0 leaves it as it is
    """

    model_config = STRICT

    num_workers: Count = 20
    timeout: Seconds = 30.0
    enable_global_rate_limit: bool = True
    image_patch_size: int = pydantic.Field(default=14, ge=0, le=64)


class ImageZoomInTool(BaseTool):
    """Takes `bbox_2d`, [x1, y1, x2, y2] in pixels, and `label`; answers with that region.

    The image is the row's `create_kwargs.image`, else the first of the conversation. config:
    `ImageZoomConfig`. The dispatcher's `rate_limit` is calls a second; verl's own class takes it
    for calls at a time.
    """

    config_keys = frozenset(ImageZoomConfig.model_fields)
    takes_image = True

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        own = read_own(ImageZoomConfig, config)
        super().__init__(with_rate_limit(config, own.enable_global_rate_limit), tool_schema)
        require("PIL", extra="images")
        self.timeout_s = own.timeout
        self.max_concurrency = own.num_workers
        self._factor = 2 * own.image_patch_size
        self._images: dict[str, Any] = {}

    async def create(
        self, instance_id: str | None = None, image: Any = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        """`image` is a PIL image. Without one, every call is answered that there is none."""
        instance_id = instance_id or uuid.uuid4().hex
        if image is not None:
            self._images[instance_id] = await asyncio.to_thread(as_model_sees, image, self._factor)
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        given, label = parameters.get("bbox_2d"), parameters.get("label", "")
        if not isinstance(given, Sequence) or len(given) != 4 or not all(map(_is_number, given)):
            text = "Error: bbox_2d parameter is missing or not a list of 4 numbers."
            return ToolResponse(text), FAILED, {"success": False}
        image = self._images.get(instance_id)
        if image is None:
            text = "Error: there is no image in this conversation."
            return ToolResponse(text), FAILED, {"success": False}
        box = region(given, *image.size)
        if box is None:
            text = (
                f"Error: The specified bounding box {given} is invalid or results in a crop "
                f"smaller than the minimum size of {MIN_DIMENSION}x{MIN_DIMENSION}."
            )
            return ToolResponse(text), FAILED, {"success": False}
        crop = await asyncio.to_thread(image.crop, box)
        named = f" with label {label}" if label else ""
        text = f"Zoomed in on the image to the region {given}{named}."
        metrics = {"success": True, "box": list(box), "box_in": list(image.size)}
        return ToolResponse(text, image=[crop]), 0.0, metrics

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        """0.0, as verl's; the answer itself is for another tool to grade."""
        return 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._images.pop(instance_id, None)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_SIDE  # type: ignore[arg-type]


# ---------------------------------------------------------------------- boxes, as in verl


def region(given: Sequence[float], width: int, height: int) -> Box | None:
    """The region to crop of an image of that size in pixels; None if there is none.

    Cut off at the image's edges; grown to `MIN_DIMENSION`, its ratio kept, if it is smaller.
    """
    box = (
        max(0.0, float(given[0])),
        max(0.0, float(given[1])),
        min(float(width), float(given[2])),
        min(float(height), float(given[3])),
    )
    if not _is_region(box):
        return None
    if min(box[2] - box[0], box[3] - box[1]) < MIN_DIMENSION:
        box = _grown(box, width, height)
    if not _is_region(box):
        return None
    left, top, right, bottom = map(math.floor, box)
    return box if min(right - left, bottom - top) >= MIN_DIMENSION else None


def _is_region(box: Box) -> bool:
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        return False
    sides = right - left, bottom - top
    return max(sides) <= MAX_ASPECT * min(sides) and min(sides) > SMALLEST_SIDE


def _grown(box: Box, width: int, height: int) -> Box:
    """The box made larger about its center, moved inside if it leaves the image."""
    left, top, right, bottom = box
    ratio = MIN_DIMENSION / min(right - left, bottom - top)
    wide, high = (right - left) * ratio, (bottom - top) * ratio
    if wide > width:
        wide, high = width, high * (width / wide)
    if high > height:
        wide, high = wide * (height / high), height
    x = max((left + right) / 2.0 - wide / 2.0, 0)
    y = max((top + bottom) / 2.0 - high / 2.0, 0)
    x = width - wide if x + wide > width else x
    y = height - high if y + high > height else y
    return math.floor(x), math.floor(y), math.ceil(x + wide), math.ceil(y + high)


# ---------------------------------------------------------------------- the image, as verl reads it


def as_model_sees(image: Any, factor: int) -> Any:
    """The PIL image in RGB, its sides the nearest multiples of `factor` (0: as they are)."""
    image = image.convert("RGB")
    if not factor:
        return image
    width, height = image.size
    wide, high = max(factor, _near(width, factor)), max(factor, _near(height, factor))
    least, most = MIN_TOKENS * factor**2, MAX_TOKENS * factor**2
    if wide * high > most:
        beta = math.sqrt(width * height / most)
        wide, high = (math.floor(side / beta / factor) * factor for side in (width, height))
    elif wide * high < least:
        beta = math.sqrt(least / (width * height))
        wide, high = (math.ceil(side * beta / factor) * factor for side in (width, height))
    return image.resize((max(factor, wide), max(factor, high)))


def _near(side: int, factor: int) -> int:
    return round(side / factor) * factor
