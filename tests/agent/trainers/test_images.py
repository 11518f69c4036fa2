"""Images in a trainer's batch: ids, inputs of the vision tower and positions are what verl 0.6.1's
own functions give for the same conversations.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.trainers.layout import Shape, batch_arrays, batch_tasks, seen_inputs
from conversations.images.reading import Picture
from conversations.trajectory import Trajectory
from tests.helpers import call, says
from tests.vision import Camera, drawn, hf_processor, vision_runtime, vision_template

MODEL, TEXT = "qwen2_5_vl", "hermes"
PAD = 151643


def verls_rows(rng: random.Random, counts: list[int]) -> dict[str, Any]:
    """A `non_tensor_batch` as verl 0.6.1's dataset makes it: `counts` images in each prompt."""
    prompts, seen = [], []
    for count in counts:
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(count)]
        parts.append({"type": "text", "text": "What is it?"})
        prompts.append([{"role": "user", "content": parts}])
        seen.append({"image": [drawn(rng) for _ in range(count)]} if count else {})
    return {"raw_prompt": prompts, "multi_modal_data": seen}


async def batch(rng: random.Random) -> tuple[list[Trajectory], dict[str, Picture]]:
    """Rows with images in the prompt, from tools, both and none."""
    template = vision_template(MODEL, TEXT)
    records: list[Trajectory] = []
    pictures: dict[str, Picture] = {}
    for row, (task, sample) in enumerate(batch_tasks(verls_rows(rng, [1, 0, 2, 0]))):
        turns = ["It is a cat."]
        if row >= 2:
            sizes = [[60 + 10 * row, 90], [33, 500]]
            turns.insert(0, call("camera", sizes=sizes, text="Here.", seed=row))
        shared = vision_runtime(template, says(template, *turns), [Camera()])
        conversation = Conversation(task, sample, shared)
        await converse(conversation)
        assert conversation.ending.error is None
        records.append(trajectory_of(conversation))
        pictures |= conversation.pictures
    return records, pictures


def test_samples_of_a_task_share_prompt_and_images() -> None:
    rows = verls_rows(random.Random(0), [1, 1])
    rows["raw_prompt"].append(rows["raw_prompt"][0])
    rows["multi_modal_data"].append(rows["multi_modal_data"][0])
    (one, first), (two, other), (again, second) = batch_tasks(rows)
    assert one.id == again.id != two.id
    assert (first, other, second) == (0, 0, 1)


@pytest.mark.parametrize("seed", range(2))
async def test_a_batch_is_what_verls_own_functions_give(seed: int) -> None:
    import torch
    from verl.models.transformers.qwen2_vl import get_rope_index
    from verl.workers.rollout.schemas import AsyncRolloutRequest

    processor = hf_processor(MODEL, TEXT)
    template = vision_template(MODEL, TEXT)
    assert template.images is not None
    records, pictures = await batch(random.Random(seed))
    shape = Shape(256, 512, PAD, True, template.images.merge_size)
    arrays = batch_arrays(records, shape)
    inputs = seen_inputs(records, shape, pictures, processor.image_processor)
    assert arrays["position_ids"].shape == (4, 4, arrays["input_ids"].shape[1])
    for row, record in enumerate(records):
        images = [pictures[image["sha256"]].image() for image in record.images]
        theirs = AsyncRolloutRequest._handle_apply_chat_template(
            processor,
            [
                {"role": "assistant", "content": one["raw"]} if one.get("raw") else one
                for one in record.messages
            ],
            multi_modal_data={"image": images, "video": []},
            tools=record.tools,
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
        )
        mask = torch.from_numpy(arrays["attention_mask"][row])
        ids = torch.from_numpy(arrays["input_ids"][row])
        whole = theirs["input_ids"][0].tolist()
        assert ids[mask.bool()].tolist() == whole[: int(mask.sum())]  # theirs ends in a newline
        assert sorted(inputs[row]) == sorted(
            key for key in theirs if key not in ("input_ids", "attention_mask")
        )
        for name, value in inputs[row].items():
            assert torch.equal(value, theirs[name])
        expected = get_rope_index(
            processor,
            input_ids=ids,
            image_grid_thw=inputs[row].get("image_grid_thw"),
            attention_mask=mask,
        )
        valid = mask.bool().numpy()
        assert np.array_equal(
            arrays["position_ids"][row][1:, valid], expected.numpy().astype(int)[:, valid]
        )
        assert arrays["position_ids"][row][0, valid].tolist() == list(range(int(mask.sum())))
        assert (arrays["position_ids"][row][:, ~valid] == 1).all()
        assert arrays["response_mask"][row].sum() == sum(
            turn.end - turn.start for turn in record.turns
        )
