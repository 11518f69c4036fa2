"""Images for an SGLang engine, in the form that keeps the prompt's ids exact in its version.

SGLang is given token ids and images. What it makes of the ids differs:

- From 0.5.14 on, ids with one placeholder an image are expanded by SGLang itself and stay exact
  (`SGLANG_MM_AVOID_RETOKENIZE`, on by default), over `/generate` too.
- Before, ids beside images are decoded and encoded again: they drift. In process the image
  processor of 0.5.5 and of 0.5.12 is replaced by `OwnProcessor`, which takes our expanded ids
  and our pixels as they are.
- Others are refused: any id that they change would be trained on as if it had been seen.

Whatever the version, the loop compares the number of prompt tokens that the engine reports with its
own. Needs nothing of SGLang at import.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.errors import EngineError
from conversations.images.pixels import joined_pixels, pixels_of, slow_processor
from conversations.images.placing import PlacedImage, spans_of
from conversations.images.positions import image_positions
from conversations.images.processor import SHAPES, ImageProcessor, collapsed, load_processor
from conversations.images.reading import Picture

EXACT_SINCE = (0, 5, 14)
REPLACED = ((0, 5, 5), (0, 5, 12))
"""Versions whose image processor is replaced in process; the tests run both."""
NATIVE_SWITCH = "SGLANG_MM_AVOID_RETOKENIZE"
REMEMBERED_BYTES = 1 << 30
"""Of images' pixels, the least recently used are forgotten first. An image of 1,024 tokens has 19
to 25 MB.
"""


async def native_fields(ids: Sequence[int], images: Sequence[PlacedImage]) -> dict[str, Any]:
    """`input_ids` and `image_data` of a request to SGLang from 0.5.14 on."""
    fields: dict[str, Any] = {"input_ids": collapsed(ids, spans_of(images))}
    pictures = [image.picture for image in images]
    fields["image_data"] = await asyncio.to_thread(lambda: [one.data_url() for one in pictures])
    return fields


def version_problem(version: str | None) -> str:
    """Why a server of that version cannot be given images; empty if it can."""
    if _numbers(version) >= EXACT_SINCE:
        return ""
    found = f"this server reports {version}" if version else "this server reports no version"
    return f"images need SGLang 0.5.14 or newer on a server, which keeps token ids exact; {found}"


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "").split(".")[:3] if part.isdigit())


def is_native() -> bool:
    """Whether the installed SGLang keeps ids exact beside images by itself."""
    try:
        from sglang.srt.environ import envs
    except ImportError:
        return False
    return hasattr(envs, NATIVE_SWITCH)


class OwnProcessor:
    """What the tokenizer manager of an older SGLang is given in place of its image processor.

    `image_data` of a request is one dict: the images' `pixels` and `places` (first token, grid).
    """

    def __init__(self, processor: ImageProcessor, special: dict[str, int]) -> None:
        self.processor = processor
        self._special = special
        self._image_processor = slow_processor(processor)
        self._pixels: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()
        self.most_bytes = REMEMBERED_BYTES

    def forget(self) -> None:
        """Forgets all pixels."""
        with self._guard:
            self._pixels.clear()
            self._bytes = 0

    async def fields(self, ids: Sequence[int], images: Sequence[PlacedImage]) -> dict[str, Any]:
        """`input_ids` and `image_data` of a request."""
        places = [(image.start, image.grid) for image in images]
        copied = list(ids)
        pixels = await asyncio.to_thread(self._pixels_of, images)
        return {"input_ids": copied, "image_data": [{"pixels": pixels, "places": places}]}

    def _pixels_of(self, images: Sequence[PlacedImage]) -> list[dict[str, Any]]:
        made = []
        for image in images:
            pixels = self._pixels_of_one(image.picture)
            found = tuple(pixels["image_grid_thw"][0].tolist())
            if found != image.grid:
                raise EngineError(f"the image processor makes {found} of an image of {image.grid}")
            made.append(pixels)
        return made

    def _pixels_of_one(self, picture: Picture) -> dict[str, Any]:
        """Several threads may be here."""
        sha256 = picture.sha256
        with self._guard:
            if sha256 in self._pixels:
                self._pixels.move_to_end(sha256)
                return self._pixels[sha256]
        pixels = pixels_of(picture, self._image_processor)
        with self._guard:
            if sha256 not in self._pixels:
                self._pixels[sha256] = pixels
                self._bytes += _bytes_of(pixels)
            while self._bytes > self.most_bytes:
                self._bytes -= _bytes_of(self._pixels.popitem(last=False)[1])
        return pixels

    async def process_mm_data_async(
        self, image_data: Any = None, input_text: Any = None, **_others: Any
    ) -> Any:
        """SGLang's own call: the ids as they came, and the multimodal inputs."""
        import torch
        from sglang.srt.managers import schedule_batch

        [given] = image_data
        ids, places = list(input_text), given["places"]
        typed = getattr(schedule_batch, "MultimodalProcessorOutput", None)  # from 0.5.12 on
        items = self._items if typed else self._one_item
        positions = image_positions(len(ids), places, self.processor.merge_size)
        delta = int(positions.max()) + 1 - len(ids)
        fields = {
            "input_ids": ids,
            "mm_items": items(given["pixels"], places),
            **self._special,
            "audio_token_id": None,
            "mrope_positions": torch.from_numpy(positions),
            "mrope_position_delta": torch.tensor([[delta]]),
        }
        return typed(**fields) if typed else fields

    def _items(self, pixels: Sequence[dict[str, Any]], places: Sequence[Any]) -> list[Any]:
        """An item for each image, so that the prefix cache knows each by its content."""
        return [
            item
            for one, place in zip(pixels, places, strict=True)
            for item in self._one_item([one], [place])
        ]

    def _one_item(self, pixels: Sequence[dict[str, Any]], places: Sequence[Any]) -> list[Any]:
        """One item for all images.

        Of several, 0.5.5 would mark every placeholder with the last one's hash, and two
        conversations that differ in an earlier image would share a prefix in its cache.
        """
        from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

        joined, tokens = joined_pixels(pixels), self.processor.tokens
        return [
            MultimodalDataItem(
                modality=Modality.IMAGE,
                feature=joined["pixel_values"],
                offsets=[(start, start + tokens(grid) - 1) for start, grid in places],
                model_specific_data={"image_grid_thw": joined["image_grid_thw"]},
            )
        ]


def _bytes_of(pixels: dict[str, Any]) -> int:
    return int(pixels["pixel_values"].nbytes)


def own_processor(folder: Path) -> OwnProcessor | None:
    """The replacement for the model in `folder`; None if its images cannot be counted.

    The configs of its shapes name the special tokens' ids.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in SHAPES.values():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = load_processor(folder, tokenizer)
    if processor is None:
        return None
    names = {
        "im_start_id": "vision_start_token_id",
        "im_end_id": "vision_end_token_id",
        "im_token_id": "image_token_id",
        "video_token_id": "video_token_id",
    }
    return OwnProcessor(processor, {ours: config.get(theirs) for ours, theirs in names.items()})


def replacements(folder: Path) -> dict[str, Any]:
    """Names of SGLang's tokenizer manager module to replace while an engine starts: none for a
    version that is not in `REPLACED`, and none for a model that sees nothing.
    """
    if is_native() or _numbers(importlib.metadata.version("sglang")) not in REPLACED:
        return {}
    own = own_processor(folder)
    if own is None:
        return {}
    return {
        "import_processors": _nothing,
        "get_processor": _nothing,
        "get_mm_processor": functools.partial(_given, own),
    }


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """SGLang would load transformers' processor, which needs torchvision and is not used."""


def _given(own: OwnProcessor, *_args: Any, **_kwargs: Any) -> OwnProcessor:
    return own
