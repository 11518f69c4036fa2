"""What tests of images build on: processors and templates of Qwen's vision models, pictures.

The processors are transformers' own classes without their part for videos, which needs torchvision.
"""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.images import ImageReader
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.runs.manifest import save_tokenizer
from agent.runs.progress import counts
from conversations.images.pixels import slow_processor
from conversations.images.processor import ImageProcessor, read_processor
from conversations.images.reading import ImageLimits, Picture, picture_of
from conversations.run.hash_store import HashStore
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.helpers import fresh_tokenizer, npm_models, settings
from tools.base import BaseTool, ToolResponse
from tools.toolset import ToolSet

SHAPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CLASSES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
LIMITS = ImageLimits()
HERMES = Path(__file__).parents[1] / "agent" / "model" / "vision_template.jinja"


def processor_settings(shape: str, **others: Any) -> dict[str, Any]:
    """A preprocessor_config.json as the published model of that shape has it, but for its size."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    patch = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 64 * 28 * 28}
    if shape == "qwen3_vl":
        mean = std = [0.5] * 3
        patch = {"patch_size": 16, "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 32 * 32}}
    fast = "Fast" if shape == "qwen3_vl" else ""
    return {
        **patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
        "image_processor_type": f"Qwen2VLImageProcessor{fast}",
        "processor_class": _CLASSES[shape],
        **others,
    }


@functools.cache
def template_text(shape: str) -> str:
    """TRL's copy of the published template; Qwen2-VL's is Qwen2.5-VL's. "hermes": the product's own
    with tools and images.
    """
    import trl

    if shape == "hermes":
        return HERMES.read_text()
    name = {"qwen2_vl": "qwen2_5_vl"}.get(shape, shape)
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@functools.cache
def vision_tokenizer(text: str) -> Any:
    tokenizer = fresh_tokenizer(npm_models("qwen2_5"))
    tokenizer.chat_template = template_text(text)
    return tokenizer


@functools.cache
def vision_template(shape: str = "qwen3_vl", text: str | None = None) -> ChatTemplate:
    """A template whose model is of that shape. `text`: another template than the shape's own."""
    tokenizer = vision_tokenizer(text or shape)
    return ChatTemplate(tokenizer, images=processor(shape))


def processor(shape: str) -> ImageProcessor:
    found = read_processor(_CLASSES[shape], processor_settings(shape), vision_tokenizer(shape))
    assert found is not None
    return found


@functools.cache
def hf_image_processor(shape: str) -> Any:
    return slow_processor(processor(shape))


@functools.cache
def hf_processor(shape: str, text: str | None = None) -> Any:
    """transformers' processor of a shape: texts and images to ids and pixels."""
    import transformers

    given = getattr(transformers, _CLASSES[shape])
    without_videos: dict[str, Any] = {"attributes": ["image_processor", "tokenizer"]}
    if hasattr(given, "get_attributes"):  # transformers 5 takes no None for the part for videos
        checked = given.check_argument_for_proper_class
        without_videos["check_argument_for_proper_class"] = lambda self, name, one: (
            None if one is None else checked(self, name, one)
        )
    tokenizer = vision_tokenizer(text or shape)
    made = type(given.__name__, (given,), without_videos)(hf_image_processor(shape), tokenizer)
    made.chat_template = tokenizer.chat_template
    return made


# ---------------------------------------------------------------------- pictures


def drawn(rng: random.Random, size: tuple[int, int] | None = None) -> Any:
    """A PIL image: blocks of color, of an odd or extreme size if none is given."""
    from PIL import Image, ImageDraw

    width, height = size or rng.choice(SIZES)
    image = Image.new("RGB", (width, height), _color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.randrange(width), rng.randrange(height)
        draw.rectangle([x, y, x + width // 3, y + height // 3], fill=_color(rng))
    return image


SIZES = (
    (4, 4), (5, 900), (800, 4), (28, 28), (29, 57), (200, 120), (113, 111), (640, 480), (97, 1001),
    (32, 32), (333, 5),
)  # fmt: skip


def picture(rng: random.Random, size: tuple[int, int] | None = None) -> Picture:
    return picture_of(drawn(rng, size), LIMITS)


def png_bytes(image: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def save_processor(folder: Path, shape: str, text: str | None = None) -> Path:
    """Writes tokenizer, template and the image processor's settings into a folder."""
    vision_tokenizer(text or shape).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_settings(shape)))
    return folder


# ---------------------------------------------------------------------- conversations


class Camera(BaseTool):
    """Answers with pictures of the sizes that its arguments name, drawn from their seed."""

    config_keys = frozenset()

    def __init__(self, name: str = "camera") -> None:
        sizes = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
        properties = {"sizes": sizes, "text": {"type": "string"}, "seed": {"type": "integer"}}
        parameters = {"type": "object", "properties": properties, "required": ["sizes"]}
        function = {"name": name, "description": "Takes pictures.", "parameters": parameters}
        super().__init__({}, {"type": "function", "function": function})

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        rng = random.Random(parameters.get("seed", 0))
        images = [drawn(rng, tuple(size)) for size in parameters["sizes"]]
        return ToolResponse(parameters.get("text"), image=images), None, {}


def vision_runtime(
    template: ChatTemplate,
    engine: Any,
    tools: Sequence[BaseTool] = (),
    stores: Sequence[HashStore] = (),
    **fields: Any,
) -> Runtime:
    """A runtime as `agent.runs.parts` makes it for a model that sees."""
    images = ImageReader(template.images, LIMITS, stores) if template.images else None
    dispatcher = None
    if tools:
        dispatcher = Dispatcher(
            ToolSet.from_tools(tools),
            max_parallel_calls=16,
            shorten=lambda text: None,
            images=images,
            placeholder=template.holds_placeholder,
        )
    return Runtime(engine, template, settings(**fields), dispatcher, images=images)


def vision_manifest(template: ChatTemplate) -> dict[str, Any]:
    """A run.json of which verify can say everything about images."""
    multi_turn = {"enable": True, "max_tool_response_length": 4096}
    multi_turn |= {"tool_response_truncate_side": "middle"}
    rollout = {"prompt_length": 4096, "response_length": 4096, "max_model_len": 8192}
    return {
        "config": {"model_path": "m", "rollout": {**rollout, "multi_turn": multi_turn}},
        "call_format": template.format_entry(),
        "image_processor": template.images.as_json() if template.images else None,
        "n": 1,
        "parent": None,
    }


async def run_into(folder: Path, runtime: Runtime, tasks: Sequence[Task]) -> list[Trajectory]:
    """Runs tasks into a run folder; returns their records."""
    records: list[Trajectory] = []
    with RunFolder.create(folder, vision_manifest(runtime.template)) as store:
        save_tokenizer(folder, runtime.template.tokenizer)
        progress = await run_tasks(
            tasks, runtime, store=store, on_done=records.append, max_concurrent=1
        )
        store.close(counts(progress))
    return records
