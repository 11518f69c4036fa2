"""Part `images`: conversations with images of 256 to 1,024 tokens on one in-process engine.

Each has an image of its own in the prompt, and its tool answers with one of 256 tokens after each
turn but the last. Sampled turns are replaced by scripted ones, as in `load`. All send the same ids
and the same images:

ideal      a bare loop; the engine's form of the images (pixels, or data URLs for a newer SGLang) is
           made before the clock starts. It cannot be beaten.
pixels     the bare loop that makes that form itself, in threads: what any runtime has to do
ours       `run_tasks`: images are read from the task's data URLs and the tool's answers, checked,
           hashed, kept as PNG and placed; `stored` with a run folder, image files and all

At the end a stored run is verified, and each turn's `prompt_tokens` is compared with the record.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.engines.engine import Generation
from agent.engines.pictures import OwnProcessor
from agent.engines.sglang import SGLangEngine
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.images import ImageReader
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task, row_task
from agent.runs.manifest import save_tokenizer
from agent.runs.parts import load_template
from conversations.images.placing import PlacedImage
from conversations.images.reading import Picture
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.tokens import TOOL
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.bench.gpu.engine import SHARED_MEMORY, empty_cache, in_process
from tests.bench.gpu.load import ANSWER, TOOL_SCHEMA, VARIANTS, Load, Outcome
from tests.bench.gpu.machine import measured
from tests.bench.gpu.model import vision_shape
from tests.bench.gpu.place import Place
from tests.vision import LIMITS, drawn, picture_of, vision_manifest
from tests.vision_models import write_tiny_model
from tools.base import BaseTool, ToolResponse
from tools.toolset import ToolSet

SIZES = (16, 64)
TURNS = 3
LENGTH = 4096
PROMPT_IMAGES = ((512, 512), (768, 768), (1024, 512), (1024, 1024))
"""Pixels: 256, 576, 512 and 1,024 tokens of Qwen3-VL."""
TOOL_IMAGE = (512, 512)


def images(place: Place) -> None:
    sizes = [2] if place.dry else SIZES
    shape = write_tiny_model if place.dry else vision_shape
    extra = (place.options.model,) if not place.dry and place.options.model else ()
    model = shape(place.folder / "vision", "qwen3_vl", *extra)
    backend = "rollout.engine_kwargs.sglang.mm_attention_backend"
    is_given = any(one.startswith(backend) for one in place.options.overrides)
    wanted = [] if place.dry or is_given else [f"{backend}=triton_attn"]
    with in_process(place, max(sizes), *wanted, model=model) as (rollout, load):
        seen = Seen(place, load, rollout.engine(), model)
        folder = SHARED_MEMORY / f"turntrace-images-{os.getpid()}"
        contenders: dict[str, Callable[[int, float], Outcome]] = {
            "ideal": seen.ideal,
            "pixels": seen.pixels,
            "ours": seen.ours,
            "stored": functools.partial(seen.ours, folder=folder),
        }
        reset = functools.partial(empty_cache, rollout, load)
        place.measure("images", contenders, sizes, reset=reset)
        with place.noting("images", f"verify of {min(sizes)} conversations") as figures:
            figures |= seen.verified(min(sizes), folder)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bare loop sends for one turn."""

    ids: list[int]
    images: list[PlacedImage]


class Seen:
    """The contenders over `engine`, with the load's scripted turns."""

    def __init__(self, place: Place, load: Load, engine: SGLangEngine, model: Path) -> None:
        config = dataclasses.replace(place.config(), model_path=str(model))
        self.load, self.engine = load, engine
        self.template: ChatTemplate = load_template(config)
        assert self.template.images is not None
        self.processor = self.template.images
        self.tool_images = [noisy(1000 + variant, TOOL_IMAGE) for variant in range(VARIANTS)]
        self._pictures = [picture_of(image, LIMITS) for image in self.tool_images]

    # ------------------------------------------------------------------ bare loops

    def ideal(self, conversations: int, _nap_s: float) -> Outcome:
        """The requests are made before the clock starts."""
        plans = self._plans(conversations)
        own = getattr(self.engine, "_own_processor", None)
        if isinstance(own, OwnProcessor):
            kept, own.most_bytes = own.most_bytes, 1 << 40  # one tensor an image, not one a turn
        ready = [[self._run(self.fields(plan)) for plan in of] for of in plans]
        if isinstance(own, OwnProcessor):
            own.most_bytes = kept
            own.forget()

        async def take(plan: dict[str, Any]) -> dict[str, Any]:
            return plan

        return self._bare(ready, take)

    def pixels(self, conversations: int, _nap_s: float) -> Outcome:
        """Each request's images are made for the engine when it is sent."""
        return self._bare(self._plans(conversations), self.fields)

    async def fields(self, plan: Plan) -> dict[str, Any]:
        return await self.engine._with_images(plan.ids, plan.images)

    def _bare(self, plans: Sequence[Sequence[Any]], fields: Any) -> Outcome:
        async def one(turns: Sequence[Any]) -> None:
            for turn in turns:
                given = await fields(turn)
                with self.load.requests.one():
                    answer = await self._ask(given)
                if len(answer["output_ids"]) != self.load.turn_tokens:
                    raise RuntimeError(f"the engine sampled {len(answer['output_ids'])} tokens")

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, plans))

        gc.collect()
        with measured(self.load.gpu, self.load.requests, self.load.loop) as usage:
            self._run(all_of_them())
        return self.load.outcome(sum(map(len, plans)), usage)

    async def _ask(self, fields: dict[str, Any]) -> Any:
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            **fields, sampling_params=self.load.work, return_logprob=True, stream=False
        )
        return await anext(self.engine._manager.generate_request(request, None))

    def _plans(self, conversations: int) -> list[list[Plan]]:
        return [self._plan(task) for task in given_tasks(conversations)]

    def _plan(self, task: Task) -> list[Plan]:
        """The ids and images of each turn, as ours will send them."""
        first = task.images[0].read(LIMITS)
        ids, images = self._placed(self.template.prompt(task.messages, [TOOL_SCHEMA], []), [first])
        plans = [Plan(ids, images)]
        for _ in range(TURNS - 1):
            variant = len(ids) % VARIANTS
            message = {"role": "tool", "content": answer_parts(), "tool_call_id": "call_0_0"}
            delta = self.template.delta([{**message, "name": TOOL_SCHEMA_NAME}], TOOL)
            before = ids + self.load.turns[variant]
            added, placed = self._placed(delta.pieces, [self._pictures[variant]], len(before))
            ids, images = before + added, images + placed
            plans.append(Plan(ids, images))
        return plans

    def _placed(
        self, pieces: Any, pictures: Sequence[Picture], shift: int = 0
    ) -> tuple[list[int], list[PlacedImage]]:
        grids = [self.processor.grid(one.width, one.height) for one in pictures]
        placed, spans = self.template.place(pieces, grids)
        images = [
            PlacedImage(picture, grid, start + shift, end + shift)
            for picture, grid, (start, end) in zip(pictures, grids, spans, strict=True)
        ]
        return [token for _, ids in placed for token in ids], images

    def _run(self, coroutine: Any) -> Any:
        return self.load.loop.run_until_complete(coroutine)

    # ------------------------------------------------------------------ ours

    def ours(self, conversations: int, _nap_s: float, folder: Path | None = None) -> Outcome:
        try:
            return self._ours(conversations, folder)
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _ours(self, conversations: int, folder: Path | None) -> Outcome:
        given, runtime = given_tasks(conversations), self.runtime()
        ended: list[Trajectory] = []
        store = RunFolder.create(folder, manifest_of(self.template)) if folder else None
        gc.collect()
        with measured(self.load.gpu, self.load.requests, self.load.loop) as usage:
            running = run_tasks(
                given, runtime, max_concurrent=conversations, store=store, on_done=ended.append
            )
            progress = self._run(running)
            if store:
                store.close({})
        if (progress.turns, progress.tool_errors) != (TURNS * conversations, 0):
            raise RuntimeError(f"not the scripted turns and calls: {progress}; {ended[:1]}")
        return self.load.outcome(progress.turns, usage, ended)

    def runtime(self) -> Runtime:
        settings = LoopSettings(
            prompt_length=LENGTH,
            response_length=LENGTH,
            max_model_len=2 * LENGTH,
            max_turns=TURNS,
            sampling={"temperature": 1.0},
        )
        reader = ImageReader(self.processor, LIMITS)
        tools = ToolSet.from_tools([Shows(self.tool_images)])
        dispatcher = Dispatcher(
            tools,
            max_parallel_calls=16,
            shorten=lambda text: None,
            images=reader,
            placeholder=self.template.holds_placeholder,
        )
        return Runtime(SeenTurns(self), self.template, settings, dispatcher, images=reader)

    def verified(self, conversations: int, folder: Path) -> dict[str, Any]:
        try:
            outcome = self._ours(conversations, folder)
            save_tokenizer(folder, self.template.tokenizer)
            found: list[str] = []
            verdict = verify_run(folder, on_defect=lambda defect: found.append(str(defect)))
            turns = [turn for one in outcome.trajectories for turn in one.turns]
            return {
                "records": len(outcome.trajectories),
                "turns": len(turns),
                "prompt_tokens_equal": sum(turn.prompt_tokens == turn.start for turn in turns),
                "images": sum(len(one.images) for one in outcome.trajectories),
                "image_tokens": sum(
                    image["end"] - image["start"]
                    for one in outcome.trajectories
                    for image in one.images
                ),
                "defects": verdict.defects,
                **({"first_defect": found[0]} if found else {}),
            }
        finally:
            shutil.rmtree(folder, ignore_errors=True)


TOOL_SCHEMA_NAME = TOOL_SCHEMA["function"]["name"]


class Shows(BaseTool):
    """Answers with the picture of the call's variant."""

    config_keys = frozenset()

    def __init__(self, pictures: Sequence[Any]) -> None:
        super().__init__({}, TOOL_SCHEMA)
        self._pictures = pictures

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        variant = int(parameters["key"].removeprefix("item ")) - 1000
        return ToolResponse(ANSWER, image=[self._pictures[variant]]), None, {}


class SeenTurns:
    """The engine as ours asks it; scripted turns take the place of what it samples."""

    def __init__(self, seen: Seen) -> None:
        self._load, self._engine = seen.load, seen.engine
        self.describe, self.abort = self._engine.describe, self._engine.abort
        self.image_problem = self._engine.image_problem

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Any, *, request_id: str, images: Any = ()
    ) -> Generation:
        variant = len(prompt_ids) % VARIANTS
        with self._load.requests.one():
            sampled = await self._engine.generate(
                prompt_ids, self._load.work, request_id=request_id, images=images
            )
        return dataclasses.replace(
            sampled, token_ids=self._load.turns[variant], finish_reason="stop"
        )

    async def close(self) -> None:
        """The engine is closed by whoever started it."""


# ---------------------------------------------------------------------- tasks and pictures


def manifest_of(template: ChatTemplate) -> dict[str, Any]:
    """A run.json of which verify can say everything."""
    manifest = vision_manifest(template)
    manifest["config"]["rollout"]["multi_turn"]["max_assistant_turns"] = TURNS
    return manifest


def answer_parts() -> list[dict[str, Any]]:
    return [{"type": "image"}, {"type": "text", "text": ANSWER}]


@functools.cache
def given_tasks(count: int) -> list[Task]:
    """Each with an image of its own, as a data URL."""
    tasks = []
    for number in range(count):
        size = PROMPT_IMAGES[number % len(PROMPT_IMAGES)]
        url = picture_of(noisy(number, size), LIMITS).data_url()
        prompt = [{"role": "user", "content": f"<image>What is item {100_000 + number} worth?"}]
        tasks.append(row_task({"prompt": prompt, "images": [url]}, str(number)))
    return tasks


def noisy(seed: int, size: tuple[int, int]) -> Any:
    """A picture that compresses as a photo does, not as a drawing."""
    from PIL import Image

    rng, (width, height) = random.Random(seed), size
    coarse = Image.frombytes(
        "RGB", (width // 4, height // 4), rng.randbytes(3 * (width // 4) * (height // 4))
    )
    return Image.blend(drawn(rng, size), coarse.resize(size), 0.3)
