"""The embedded model in Qwen2.5-VL's shape on the real CPU engine: what it samples beside an image
is what transformers computes for the same ids and pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.commands.tasks_diagrams import diagram_rows
from agent.commands.tasks_work import write_rows
from agent.model.base import vision_model_dir
from conversations.images.pixels import joined_pixels, pixels_of, slow_processor
from conversations.images.reading import ImageLimits, stored_picture
from conversations.open_run import open_run
from conversations.trajectory import Trajectory
from tests.command import ENGINE, turntrace

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SETTINGS = (
    "model_path=smollm2-vision",
    "rollout.prompt_length=1024",
    "rollout.response_length=160",
    "rollout.dtype=bfloat16",
    "rollout.temperature=1.0",
    "rollout.turntrace.max_tokens=40",
)
BFLOAT16 = 0.3
"""Nats: what rounding to bf16 may do; wrong positions or pixels cost several."""


def transformers_logprobs(record: Trajectory, pixels: dict[str, Any]) -> list[float]:
    """Of each sampled token, in order."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        vision_model_dir(), dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    ids = record.prompt_ids + record.response_ids
    whole = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **pixels).logits
    found = logits[0].float().log_softmax(-1)
    return [
        float(found[place - 1, ids[place]])
        for turn in record.turns
        for place in range(turn.start, turn.end)
    ]


def test_a_diagram_goes_through_the_engine_exactly(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", diagram_rows(1, 3))
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ("run", "d.jsonl", "--tools", "geo3k", "--out", "run", *options)
    ran = turntrace(*command, cwd=tmp_path, timeout=600, imports=ENGINE)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    verified = turntrace("verify", "run", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    run = open_run(tmp_path / "run")
    [record] = run
    [image] = record.images
    assert record.turns[0].prompt_tokens == len(record.prompt_ids) == record.turns[0].start
    processor = run.template().images
    assert processor is not None
    picture = stored_picture(run.image(image["sha256"]), image["sha256"], ImageLimits())
    pixels = joined_pixels([pixels_of(picture, slow_processor(processor))])
    theirs = transformers_logprobs(record, pixels)
    ours = [value for value in record.response_logprobs if value is not None]
    assert len(ours) == len(theirs) > 0
    assert max(abs(one - two) for one, two in zip(ours, theirs, strict=True)) < BFLOAT16
