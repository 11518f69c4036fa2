"""The zoom tool beside verl's own: the same boxes, texts and rewards."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from tests.vision import drawn
from tools.image_zoom import ImageZoomInTool, as_model_sees, region
from tools.registry import load_tools

CONFIG = Path(__file__).parents[2] / "tool_configs" / "image_zoom.yaml"


def ours() -> ImageZoomInTool:
    tool = load_tools(CONFIG)["image_zoom_in_tool"].tool
    assert isinstance(tool, ImageZoomInTool)
    return tool


@pytest.fixture(scope="module")
def verls() -> Any:
    """verl's class without its Ray pool. qwen_vl_utils needs torchvision: only its name is here."""
    name = "qwen_vl_utils"
    stand_in = types.ModuleType(name)
    stand_in.fetch_image = None  # type: ignore[attr-defined]
    before = sys.modules.get(name)
    sys.modules.setdefault(name, stand_in)
    try:
        from verl.tools.image_zoom_in_tool import ImageZoomInTool as Verls
    finally:
        if before is None:
            del sys.modules[name]
    made = Verls.__new__(Verls)
    made._instance_dict = {}
    return made


def boxes(rng: random.Random, width: int, height: int) -> list[list[float]]:
    """Inside, outside, tiny, thin, reversed, whole numbers and others."""
    found = [[rng.uniform(-50, width + 50), rng.uniform(-50, height + 50)] * 2 for _ in range(5)]
    for _ in range(40):
        x, y = rng.uniform(-30, width), rng.uniform(-30, height)
        wide, high = rng.choice((0.3, 1, 5, 27, 28, 29, 90)), rng.choice((0.3, 1, 5, 28, 60, 400))
        box = [x, y, x + wide, y + high]
        found.append([round(side) for side in box] if rng.random() < 0.5 else box)
    return [*found, [90, 90, 30, 30], [0, 0, width, height], [0, 0, 100, 0.5]]


@pytest.mark.parametrize("seed", range(4))
async def test_boxes_texts_and_rewards_are_verls(verls: Any, seed: int) -> None:
    rng = random.Random(seed)
    image = as_model_sees(drawn(rng, rng.choice(((200, 120), (56, 28), (30, 30), (840, 301)))), 28)
    tool = ours()
    await tool.create("one", image=image)
    verls._instance_dict["one"] = {"image": image}
    for box in boxes(rng, *image.size):
        arguments = {"bbox_2d": box, "label": rng.choice(("", "square"))}
        response, reward, metrics = await tool.execute("one", arguments)
        theirs, their_reward, their_metrics = await verls.execute("one", arguments)
        assert (response.text, reward) == (theirs.text, their_reward)
        assert metrics["success"] == their_metrics["success"]
        assert (response.image is None) == (theirs.image is None)
        if response.image:
            assert response.image[0].size == theirs.image[0].size
            assert not ImageChops.difference(response.image[0], theirs.image[0]).getbbox()
    await tool.release("one")


@pytest.mark.parametrize(
    "box",
    [None, [1, 2, 3], "1234", [1, 2, 3, "4"], [1, 2, 3, float("nan")], [0, 0, 5, 10**400]],
)
async def test_what_is_no_box_is_said_to_the_model(box: Any) -> None:
    tool = ours()
    await tool.create("one", image=Image.new("RGB", (56, 56)))
    response, reward, metrics = await tool.execute("one", {"bbox_2d": box})
    assert response.text is not None
    assert "list of 4 numbers" in response.text
    assert (reward, metrics) == (-0.05, {"success": False})


@pytest.mark.parametrize(
    ("size", "expected"),
    [((200, 120), (196, 112)), ((28, 28), (56, 56)), ((10, 900), (28, 896)), ((56, 84), (56, 84))],
)
def test_the_picture_is_resized_as_qwen_vl_utils_does(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Sizes that `fetch_image` of qwen_vl_utils 0.0.14 gives."""
    assert as_model_sees(Image.new("RGB", size), 28).size == expected


async def test_without_an_image_the_model_is_told() -> None:
    tool = ours()
    await tool.create("one")
    response, reward, metrics = await tool.execute("one", {"bbox_2d": [0, 0, 50, 50]})
    assert "no image" in (response.text or "")
    assert (reward, metrics) == (-0.05, {"success": False})


def test_a_region_without_a_size_is_none() -> None:
    assert region([0, 0, 1e-310, 1e-310], 56, 56) is None


def test_a_region_is_never_outside_the_image() -> None:
    rng = random.Random(9)
    for _ in range(500):
        width, height = rng.randrange(28, 300), rng.randrange(28, 300)
        box = region([rng.uniform(-99, 400) for _ in range(4)], width, height)
        if box:
            assert 0 <= box[0] < box[2] <= width
            assert 0 <= box[1] < box[3] <= height
