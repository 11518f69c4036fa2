"""What an SGLang engine is sent for images, by version, and who is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agent.engines.pictures import OwnProcessor, native_fields, version_problem
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.loop.asides import Asides, CallModel
from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.tasks import row_task
from conversations.images.placing import PlacedImage
from conversations.images.positions import image_positions
from tests.helpers import Generation, hermes_template, logprobs, runtime, says
from tests.vision import drawn, picture, vision_runtime, vision_template
from tools.base import BackendError


def placed(seed: int) -> tuple[list[int], list[PlacedImage]]:
    """Ids with two images in them, expanded."""
    rng = random.Random(seed)
    processor = vision_template().images
    assert processor is not None
    ids, images = [1, 2, 3], []
    for _ in range(2):
        one = picture(rng)
        grid = processor.grid(one.width, one.height)
        start = len(ids)
        ids += [processor.placeholder_id] * processor.tokens(grid)
        images.append(PlacedImage(one, grid, start, len(ids)))
        ids += [4, 5]
    return ids, images


async def test_newer_versions_get_one_placeholder_and_a_data_url_an_image() -> None:
    ids, images = placed(0)
    sign = ids[images[0].start]
    fields = await native_fields(ids, images)
    assert fields["input_ids"] == [1, 2, 3, sign, 4, 5, sign, 4, 5]
    assert fields["image_data"] == [one.picture.data_url() for one in images]


async def test_0_5_5_gets_the_expanded_ids_our_pixels_and_positions() -> None:
    pytest.importorskip("sglang.srt.managers.schedule_batch")
    processor = vision_template().images
    assert processor is not None
    own = OwnProcessor(processor, {"im_start_id": 1})
    ids, images = placed(1)
    fields = await own.fields(ids, images)
    assert fields["input_ids"] == ids
    seen = await own.process_mm_data_async(fields["image_data"], fields["input_ids"])
    assert seen["input_ids"] == ids
    [item] = seen["mm_items"]
    assert item.offsets == [(one.start, one.end - 1) for one in images]
    expected = image_positions(len(ids), [(one.start, one.grid) for one in images], 2)
    assert seen["mrope_positions"].tolist() == expected.tolist()
    assert int(seen["mrope_position_delta"]) == int(expected.max()) + 1 - len(ids)


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [("0.5.14", True), ("0.5.23", True), ("0.6.0", True), ("0.5.13", False), ("0.5.5", False),
     (None, False), ("unknown", False), ("0.5.14.post1", True), ("0.5.12.post2", False)],
)  # fmt: skip
def test_servers_of_older_versions_are_refused_by_name(version: str, is_taken: bool) -> None:
    problem = version_problem(version)
    assert (not problem) == is_taken
    assert is_taken or "0.5.14" in problem


def task() -> Any:
    row = {"prompt": [{"role": "user", "content": "<image>?"}], "images": [drawn(random.Random(1))]}
    return row_task(row, "t")


async def test_a_text_model_refuses_a_task_with_images() -> None:
    template = hermes_template()
    conversation = Conversation(task(), 0, runtime(template, says(template, "never")))
    await converse(conversation)
    assert conversation.ending.stop_reason == "engine_error"
    assert not conversation.ending.infra_error
    assert "sees no images" in (conversation.ending.error or "")


async def test_an_engine_that_cannot_take_images_is_never_asked() -> None:
    template = vision_template()

    class Old(ScriptedEngine):
        def image_problem(self) -> str:
            return version_problem("0.5.12")

    def respond(*_: Any) -> Generation:
        raise AssertionError("asked")

    conversation = Conversation(task(), 0, vision_runtime(template, Old(respond)))
    await converse(conversation)
    assert "0.5.14" in (conversation.ending.error or "")


async def test_a_prompt_that_the_engine_encoded_anew_is_an_engine_error() -> None:
    template = vision_template()
    ids = [*template.encode("Yes"), template.end_id]

    def respond(prompt: Any, sampling: Any) -> Generation:
        return Generation(ids, logprobs(ids), "stop", prompt_tokens=len(prompt) - 1)

    conversation = Conversation(task(), 0, vision_runtime(template, ScriptedEngine(respond)))
    await converse(conversation)
    assert conversation.ending.stop_reason == "engine_error"
    assert not conversation.turns


async def test_a_sampled_placeholder_ends_the_conversation() -> None:
    template = vision_template()
    assert template.images is not None
    turn = [*template.encode("Look: "), template.images.placeholder_id]
    conversation = Conversation(task(), 0, vision_runtime(template, says(template, turn)))
    await converse(conversation)
    assert conversation.ending.stop_reason == "engine_error"
    assert conversation.tokens.ids[-1] == template.images.placeholder_id  # it was sampled


async def test_a_sampled_placeholder_is_no_answer_for_a_tool() -> None:
    template = vision_template()
    assert template.images is not None
    turn = [*template.encode("Look: "), template.images.placeholder_id]
    asides = Asides(vision_runtime(template, says(template, turn)), [])
    model = CallModel(asides, "camera", "call_0_0")
    with pytest.raises(BackendError, match="image"):
        await model.ask([{"role": "user", "content": "What is it?"}])
    assert asides.sequences() == []


async def test_a_text_with_a_placeholder_is_refused() -> None:
    template = vision_template()
    row = {"prompt": [{"role": "user", "content": "What is <|image_pad|>?"}]}
    shared = vision_runtime(template, says(template, EngineError("asked")))
    conversation = Conversation(row_task(row, "t"), 0, shared)
    await converse(conversation)
    assert "<|image_pad|>" in (conversation.ending.error or "")
    assert not conversation.turns
