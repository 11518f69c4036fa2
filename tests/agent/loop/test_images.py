"""Conversations with images: what stands in the tokens, and that it is what the model's own
processor makes of the same conversation.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.loop.tasks import Task, row_task
from conversations.checks.facts import RunFacts, facts_of
from conversations.checks.record import check_line
from conversations.images.positions import image_positions
from conversations.messages import image_parts
from conversations.run.store import image_store, read_manifest
from conversations.trajectory import Trajectory, line_hash
from conversations.verify import verify_run
from tests.helpers import call, respelled, says
from tests.vision import (
    SIZES,
    Camera,
    drawn,
    hf_image_processor,
    hf_processor,
    png_bytes,
    run_into,
    vision_runtime,
    vision_template,
)

TEMPLATES = [("qwen3_vl", None), ("qwen2_5_vl", "hermes"), ("qwen2_vl", None)]


def task_with(rng: random.Random, count: int, name: str = "t") -> Task:
    """verl's form: an `images` column, and a placeholder in the text for each."""
    images = [{"bytes": png_bytes(drawn(rng)), "path": None} for _ in range(count)]
    pieces = [f"Look{i}: <image>" for i in range(count)] + ["what is it?"]
    rng.shuffle(pieces)
    prompt = [{"role": "user", "content": "\n".join(pieces)}]
    return row_task({"prompt": prompt, "images": images, "data_source": "d"}, name)


def random_turns(rng: random.Random, template: Any, *, tools: bool) -> list[Any]:
    """Turns with calls, some of which answer with images, then an answer; some spelt oddly."""
    turns: list[Any] = []
    for _ in range(rng.randrange(3) if tools else 0):
        calls = [
            call(
                "camera",
                sizes=[rng.choice(SIZES) for _ in range(rng.choice((0, 1, 1, 2)))],
                text=rng.choice(("", "Here.", "two\n\nlines")),
                seed=rng.randrange(100),
            )
            for _ in range(rng.choice((1, 1, 2)))
        ]
        turns.append("\n".join(["Let me look.", *calls]))
    turns.append("It is " + rng.choice(("a cat", "42", "漢字")))
    return [
        [*respelled(template, turn, rng), template.end_id] if rng.random() < 0.4 else turn
        for turn in turns
    ]


def canonical_ids(record: Trajectory, template: Any) -> list[int]:
    """The record's ids with each sampled turn spelt as the tokenizer spells it."""
    ids, position = [], 0
    whole = record.prompt_ids + record.response_ids
    for turn in record.turns:
        text = template.decode(whole[turn.start : turn.end])
        ids += whole[position : turn.start] + template.encode(text)
        position = turn.end
    return ids + whole[position:]


def spans(ids: list[int], sign: int) -> list[int]:
    """The lengths of the runs of a token."""
    return [len(list(run)) for token, run in itertools.groupby(ids) if token == sign]


@pytest.mark.parametrize(("shape", "text"), TEMPLATES)
@pytest.mark.parametrize("seed", range(6))
async def test_ids_and_pixels_are_what_the_models_processor_gives(
    shape: str, text: str | None, seed: int
) -> None:
    import torch

    rng = random.Random(f"{shape}{seed}")
    template = vision_template(shape, text)
    has_tools = shape != "qwen2_vl"  # its template shows none
    turns = random_turns(rng, template, tools=has_tools)
    tools = [Camera()] if has_tools else []
    shared = vision_runtime(template, says(template, *turns), tools)
    conversation = Conversation(task_with(rng, seed % 3), 0, shared)
    await converse(conversation)
    record = Trajectory.from_line(trajectory_of(conversation).to_line())

    assert record.error is None
    assert record.stop_reason == "stop"
    as_said = [  # a turn is what was sampled, however the template would write its calls
        {"role": "assistant", "content": message["raw"]} if message.get("raw") else message
        for message in record.messages
    ]
    whole = template.tokenizer.apply_chat_template(
        as_said, tools=record.tools or None, tokenize=False
    ).removesuffix("\n")
    pictures = [image.picture.image() for image in conversation.images]
    theirs = hf_processor(shape, text)(text=[whole], images=pictures or None, return_tensors="pt")
    assert canonical_ids(record, template) == theirs["input_ids"][0].tolist()
    sign = template.images.placeholder_id
    lengths = [image["end"] - image["start"] for image in record.images]
    assert lengths == spans(theirs["input_ids"][0].tolist(), sign)
    ids = record.prompt_ids + record.response_ids
    mask = [0] * len(record.prompt_ids) + record.response_mask
    for image in record.images:
        assert set(ids[image["start"] : image["end"]]) == {sign}
        assert not any(mask[image["start"] : image["end"]])
    sampled = [ids[turn.start : turn.end] for turn in record.turns]
    assert sampled == [
        turn if isinstance(turn, list) else [*template.encode(turn), template.end_id]
        for turn in turns
    ]
    if record.images:
        one_by_one = [hf_image_processor(shape)([one], return_tensors="pt") for one in pictures]
        pixels = torch.cat([each["pixel_values"] for each in one_by_one])
        assert torch.equal(pixels, theirs["pixel_values"])
        grids = [image["grid"] for image in record.images]
        assert grids == theirs["image_grid_thw"].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_positions_are_verls_and_transformers(seed: int) -> None:
    """transformers' model on a whole sequence; verl 0.6.1's function likewise."""
    import torch
    from verl.models.transformers.qwen2_vl import get_rope_index

    rng = random.Random(seed)
    template = vision_template("qwen2_5_vl", "hermes")
    processor = template.images
    assert processor is not None
    ids: list[int] = []
    images = []
    for _ in range(seed + 1):
        ids += [5] * rng.randrange(1, 9)
        grid = processor.grid(*rng.choice(SIZES))
        ids += template.encode("<|vision_start|>")
        images.append((len(ids), grid))
        ids += [processor.placeholder_id] * processor.tokens(grid)
        ids += template.encode("<|vision_end|>")
    ids += [7] * rng.randrange(9)
    whole = torch.tensor(ids)
    grids = torch.tensor([grid for _, grid in images])
    theirs = get_rope_index(
        hf_processor("qwen2_5_vl", "hermes"),
        input_ids=whole,
        image_grid_thw=grids,
        attention_mask=torch.ones_like(whole),
    )
    ours = image_positions(len(ids), images, processor.merge_size)
    assert ours.tolist() == theirs.tolist()


async def test_a_run_with_images_verifies_and_keeps_each_image_once(tmp_path: Path) -> None:
    template = vision_template()
    rng = random.Random(3)
    same = [
        Task(f"t{i}", one.messages, images=one.images)
        for i, one in enumerate([task_with(rng, 1)] * 2)
    ]
    turns = [
        call("camera", sizes=[[90, 40], [30, 30]], text="Two.", seed=1),
        "Done.",
    ] * 2
    records = await run_into(
        tmp_path / "run", vision_runtime(template, says(template, *turns), [Camera()]), same
    )
    assert [record.stop_reason for record in records] == ["stop"] * 2
    assert len(list((tmp_path / "run" / "images").iterdir())) == 3
    assert len(records[0].images) == 3
    assert records[0].tool_calls[0].images == [one["sha256"] for one in records[0].images[1:]]
    verdict = verify_run(tmp_path / "run", on_defect=print)
    assert verdict.defects == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFacts]:
    """A run of one conversation whose prompt and tool show an image, and its facts."""
    template = vision_template()
    turns = [call("camera", sizes=[[90, 40]], seed=1), "Done."]
    shared = vision_runtime(template, says(template, *turns), [Camera()])
    run = tmp_path_factory.mktemp("images") / "run"
    asyncio.run(run_into(run, shared, [task_with(random.Random(4), 1)]))
    return run, facts_of(read_manifest(run), template, run)


def problems(finished: tuple[Path, RunFacts], change: Any = None) -> list[str]:
    """What verify finds in the run's record, changed and its hash forged."""
    run, facts = finished
    record = json.loads((run / "trajectories.jsonl").read_text())
    if change:
        change(record)
        record["sha256"] = line_hash(record)
    return [str(found) for found in check_line(json.dumps(record).encode(), facts).findings]


def _swap(record: dict[str, Any]) -> None:
    record["images"][0]["sha256"], record["images"][1]["sha256"] = (
        record["images"][1]["sha256"],
        record["images"][0]["sha256"],
    )


def _longer(record: dict[str, Any]) -> None:
    record["images"][0]["end"] += 1


def _other_size(record: dict[str, Any]) -> None:
    record["images"][0]["width"] += 1


def _other_grid(record: dict[str, Any]) -> None:
    record["images"][1]["grid"][1] += 2


def _dropped(record: dict[str, Any]) -> None:
    del record["images"][1]


def _named_otherwise(record: dict[str, Any]) -> None:
    next(image_parts(record["messages"]))["image"] = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "change", [_swap, _longer, _other_size, _other_grid, _dropped, _named_otherwise]
)
def test_what_is_changed_about_images_is_found(
    finished: tuple[Path, RunFacts], change: Any
) -> None:
    assert problems(finished) == []
    assert problems(finished, change)


@pytest.mark.parametrize("damage", ["removed", "changed", "other"])
def test_a_damaged_image_file_is_a_defect(
    finished: tuple[Path, RunFacts], damage: str, tmp_path: Path
) -> None:
    run, facts = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    sha256 = json.loads((copy / "trajectories.jsonl").read_text())["images"][0]["sha256"]
    file = image_store(copy).path(sha256)
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "changed" else b"GIF89a")
    found = problems((copy, replace(facts, images=image_store(copy))))
    assert any(sha256 in one for one in found)
