"""Conversations with images in verl 0.9.1's own workers: every tensor of a row, its
`multi_modal_inputs` and the four rows of positions are those of verl's own loops.

The inputs and positions are made by verl's worker from what the loop hands back. Run by
`tests/agent/trainers/test_verl_agent_loop.py`.
"""

from __future__ import annotations

import json
import random
import types
from typing import Any

import pytest
import torch

from tests.agent.verl09.cases import assert_equal, extras, run
from tests.agent.verl09.peer import Peers
from tests.helpers import call
from tests.vision import drawn, hf_processor, vision_template
from tests.vision_models import model_config

SHAPE, TEXT = "qwen2_5_vl", "hermes"
ROOM = {"prompt_length": 1024, "response_length": 1024}


class Dataset:
    """In place of verl's, which resizes images with qwen_vl_utils before its processor does."""

    @staticmethod
    async def process_multi_modal_info(messages: Any, **_others: Any) -> tuple[Any, None, None]:
        parts = [part for message in messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        return images or None, None, None


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    template = vision_template(SHAPE, TEXT)
    config = model_config(template.tokenizer, SHAPE)
    return Peers(tmp_path_factory.mktemp("verl"), template, config)


def seeing(peers: Peers, server: Any, **options: Any) -> Any:
    """A worker with the processor that verl's `hf_processor` would load, bound as it does that."""
    from transformers import AutoConfig
    from transformers.models.qwen2_5_vl import Qwen2_5_VLModel

    worker = peers.worker(server, **ROOM, **options)
    processor = hf_processor(SHAPE, TEXT)
    processor.config = AutoConfig.from_pretrained(worker.config.actor_rollout_ref.model.path)
    for name in ("get_rope_index", "get_vision_position_ids"):
        if hasattr(Qwen2_5_VLModel, name):
            setattr(processor, name, types.MethodType(getattr(Qwen2_5_VLModel, name), processor))
    worker.processor, worker.dataset_cls = processor, Dataset
    return worker


def question(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": drawn(random.Random(str(size)), size)} for size in sizes
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def assert_equal_images(ours: Any, verls: Any) -> None:
    assert_equal(ours, verls)
    assert ours.batch["position_ids"].shape[1] == 4
    for one, other in zip(inputs(ours), inputs(verls), strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


async def test_images_in_prompts(peers: Peers) -> None:
    server = peers.server(lambda text: "It is a cat.")
    worker = seeing(peers, server)
    rows = question((90, 40)), question((33, 333), (64, 64)), question()
    ours = await run(worker, *rows)
    verls = await run(worker, *rows, agent="single_turn_agent")
    assert_equal_images(ours, verls)
    assert [len(one.get("image_grid_thw", ())) for one in inputs(ours)] == [1, 2, 0]
    sent = [len(one["image_data"] or ()) for one in server.media]
    assert sorted(sent) == [0, 0, 1, 1, 2, 2]


async def test_images_from_tools(peers: Peers) -> None:
    turns = [
        call("look", question=json.dumps([[60, 90], [33, 200]])),
        call("look", question="[[40, 40]]"),
        "Done.",
    ]

    def say(text: str) -> str:
        return turns[text.count("<tool_response>\n<|vision_start|>")]

    worker = seeing(peers, peers.server(say), tools="PictureTool")
    ours = await run(worker, question((90, 40)), question((28, 28)))
    verls = await run(worker, question((90, 40)), question((28, 28)), agent="tool_agent")
    assert_equal_images(ours, verls)
    assert [len(one["image_grid_thw"]) for one in inputs(ours)] == [4, 4]
    assert extras(ours)["error"] is None


def inputs(done: Any) -> list[dict[str, Any]]:
    return list(done.non_tensor_batch["multi_modal_inputs"])


async def test_a_prompt_that_verls_server_would_encode_anew_costs_its_row(peers: Peers) -> None:
    """SGLang 0.5.12, verl's own, decodes ids beside images."""

    def odd(text: str) -> list[int]:
        called = peers.template.encode(call("look", question="[[40, 40]]"))
        return [*[one for letter in "It is" for one in peers.template.encode(letter)], *called,
                peers.template.end_id]  # fmt: skip

    done = await run(seeing(peers, peers.server(odd), tools="PictureTool"), question((90, 40)))
    assert "encode this prompt anew" in extras(done)["error"]
    assert not done.batch["response_mask"].any()


def test_torchvision_is_not_here() -> None:
    """Were torchvision installed, verl's own processor would be used."""
    with pytest.raises(ImportError):
        import torchvision  # noqa: F401
