"""What a model's image processor makes of an image: a grid of patches, and so many tokens.

Only the sizes count here: they follow from the processor's settings, which are a JSON file beside
the model, and no package is needed to compute them. Known are the processors of Qwen2-VL,
Qwen2.5-VL and Qwen3-VL, which share one rule (`smart_resize` in transformers'
models/qwen2_vl/image_processing_qwen2_vl.py, 4.57.1).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.errors import ImageError, TemplateError
from conversations.images.reading import MAX_ASPECT
from conversations.tokens import Piece

SHAPES = {
    "Qwen2VLProcessor": "qwen2_vl",
    "Qwen2_5_VLProcessor": "qwen2_5_vl",
    "Qwen3VLProcessor": "qwen3_vl",
}
"""The processors whose images can be counted, and the shape of model that each belongs to."""
IMAGE_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
)
"""The last is transformers 5's without torchvision."""
FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers 4 and 5 keep the settings, the later one under `image_processor`."""
PLACEHOLDER, VIDEO = "<|image_pad|>", "<|video_pad|>"

Grid = tuple[int, int, int]
"""Patches in time (1), height and width, before `merge_size` of them in each direction become one
token.
"""


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """A model's image processor. `settings` are its JSON, `name` its class in transformers.

    `placeholder_id` is the token that stands for an image, once in a rendered text and once a token
    of the image in the sequence; `reserved_ids` are all that no text may hold.
    """

    name: str
    shape: str
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    placeholder_id: int
    reserved_ids: tuple[int, ...]
    settings: Mapping[str, Any] = field(repr=False)

    def grid(self, width: int, height: int) -> Grid:
        """The grid of an image of that size in pixels. Raises ImageError."""
        factor = self.patch_size * self.merge_size
        rows, columns = smart_resize(
            height, width, factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return 1, rows // self.patch_size, columns // self.patch_size

    def tokens(self, grid: Sequence[int]) -> int:
        """How many tokens an image of that grid has."""
        return math.prod(grid) // self.merge_size**2

    def sha256(self) -> str:
        """The hash of the settings."""
        text = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """`image_processor` of a run.json; `read_processor` reads it."""
        return {"name": self.name, "sha256": self.sha256(), "settings": dict(self.settings)}


def smart_resize(
    height: int, width: int, factor: int, *, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) that an image is resized to: multiples of `factor`, pixels in the range, the
    ratio about the same. Raises ImageError for a ratio above MAX_ASPECT.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(f"an image of {width}x{height} pixels is too long for its width")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def load_processor(folder: Path, tokenizer: Any) -> ImageProcessor | None:
    """The image processor of a model's folder; None if there is none or it is of another kind.

    Raises TemplateError if its files cannot be read or do not fit the tokenizer.
    """
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TemplateError(f"{file} cannot be read: {error}") from error
        if isinstance(settings, dict):
            inner = settings.get("image_processor")
            merged = {**settings, **inner} if isinstance(inner, dict) else settings
            if kind := merged.get("processor_class"):
                return read_processor(str(kind), merged, tokenizer)
    return None


def read_processor(name: str, settings: Mapping[str, Any], tokenizer: Any) -> ImageProcessor | None:
    """The processor of a class and its settings; None if images of that class are not known.

    Raises TemplateError if the settings are not that class's.
    """
    kind = settings.get("image_processor_type")
    if name not in SHAPES or (kind is not None and kind not in IMAGE_PROCESSORS):
        return None
    token_id = tokenizer.backend_tokenizer.token_to_id
    placeholder, video = token_id(PLACEHOLDER), token_id(VIDEO)
    if placeholder is None or video is None:
        raise TemplateError(f"{name}: the tokenizer has no {PLACEHOLDER} or no {VIDEO}")
    given = settings.get("size")
    size = given if isinstance(given, dict) else {}
    least, most = size.get("shortest_edge", 56 * 56), size.get("longest_edge", 28 * 28 * 1280)
    numbers = {
        "patch_size": settings.get("patch_size", 14),
        "merge_size": settings.get("merge_size", 2),
        "min_pixels": settings.get("min_pixels") or least,
        "max_pixels": settings.get("max_pixels") or most,
    }
    for key, value in numbers.items():
        if type(value) is not int or not 0 < value <= 1 << 32:
            raise TemplateError(f"{name}: {key} is {value!r:.40}, expected a positive number")
    return ImageProcessor(
        name=name,
        shape=SHAPES[name],
        placeholder_id=placeholder,
        reserved_ids=(placeholder, video),
        settings=dict(settings),
        **numbers,
    )


def processor_of(given: Any) -> ImageProcessor | None:
    """That of transformers' own processor, as a trainer has it; None if images of its class are not
    known.
    """
    image_processor = getattr(given, "image_processor", None)
    if image_processor is None:
        return None
    settings = json.loads(json.dumps(image_processor.to_dict(), default=str))
    settings["image_processor_type"] = type(image_processor).__name__
    return read_processor(type(given).__name__, settings, given.tokenizer)


def place(
    pieces: Sequence[Piece], grids: Sequence[Grid], processor: ImageProcessor
) -> tuple[list[Piece], list[tuple[int, int]]]:
    """Pieces with each placeholder repeated once for each token of its image.

    Returns them and the images' spans [start, end) over all of the pieces, in order. Raises
    ImageError if there are more or fewer placeholders than `grids`: a text holds one.
    """
    sign = processor.placeholder_id
    found = sum(ids.count(sign) for _, ids in pieces)
    if found != len(grids):
        raise ImageError(
            f"the messages hold {len(grids)} images but render to {found} {PLACEHOLDER}: "
            "a text must not hold that token"
        )
    if not found:
        return list(pieces), []
    counts = iter([processor.tokens(grid) for grid in grids])
    placed: list[Piece] = []
    spans, position = [], 0
    for kind, ids in pieces:
        whole: list[int] = []
        for token in ids:
            if token != sign:
                whole.append(token)
                continue
            count, start = next(counts), position + len(whole)
            whole += [sign] * count
            spans.append((start, start + count))
        placed.append((kind, whole))
        position += len(whole)
    return placed, spans


def collapsed(ids: Sequence[int], spans: Sequence[Sequence[int]]) -> list[int]:
    """Token ids with one placeholder for each image: the form that SGLang expands itself."""
    short: list[int] = []
    position = 0
    for start, end in spans:
        short += ids[position : start + 1]
        position = end
    short += ids[position:]
    return short
