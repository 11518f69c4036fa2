"""ATIF documents with images: as data URLs, as files below a folder that the user names, and
nothing else; in the tokens where the tokens have them.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

import conversations
from conversations.errors import ImportFileError
from conversations.images.reading import picture_of
from conversations.imports.job import Imported, import_run
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.conversations.test_import import TOOL, foreign
from tests.vision import LIMITS, drawn, png_bytes, save_processor, vision_template

SHAPE, TEXT = "qwen2_5_vl", "hermes"
PICTURES = [drawn(random.Random(seed), (90, 60)) for seed in (1, 2)]
URLS = [f"data:image/png;base64,{base64.b64encode(png_bytes(one)).decode()}" for one in PICTURES]


def shown(path: str, text: str) -> list[dict[str, Any]]:
    source = {"media_type": "image/png", "path": path}
    return [{"type": "image", "source": source}, {"type": "text", "text": text}]


def document(paths: list[str], *, cut: int = 0) -> dict[str, Any]:
    """A user and a tool show an image each. `cut` tokens are missing from the first image."""
    template = vision_template(SHAPE, TEXT)
    assert template.images is not None
    pictures = [picture_of(one, LIMITS) for one in PICTURES]
    grids = [template.images.grid(one.width, one.height) for one in pictures]
    parts = [
        [{"type": "image", "image": one.reference}, {"type": "text", "text": text}]
        for one, text in zip(pictures, ("What is it?", "Here."), strict=True)
    ]
    asked = template.prompt([{"role": "user", "content": parts[0]}], [TOOL])
    answered = template.delta([{"role": "tool", "content": parts[1]}]).pieces
    before, gap = (
        [token for _, ids in template.place(pieces, [grid])[0] for token in ids]
        for pieces, grid in ((asked, grids[0]), (answered, grids[1]))
    )
    if cut:
        place = before.index(template.images.placeholder_id)
        del before[place : place + cut]
    call = '<tool_call>\n{"name": "calculator", "arguments": {"a": 6}}\n</tool_call>'
    first, second = ([*template.encode(one), template.end_id] for one in (call, "A cat."))
    found = foreign()
    user, agent, last = found["steps"]
    user["message"] = shown(paths[0], "What is it?")
    agent["observation"]["results"][0]["content"] = shown(paths[1], "Here.")
    last["message"] = "A cat."
    for step, prompt, ids in ((agent, before, first), (last, [*before, *first, *gap], second)):
        step["metrics"] |= {
            "prompt_token_ids": prompt,
            "completion_token_ids": ids,
            "logprobs": [-0.5] * len(ids),
        }
    return found


def take(tmp_path: Path, found: Any, **options: Any) -> tuple[Imported, Trajectory]:
    file = tmp_path / "in.json"
    file.write_text(json.dumps(found))
    done = import_run(file, "atif", tmp_path / "run", **options)
    assert verify_run(tmp_path / "run", on_defect=print).defects == 0
    [record] = conversations.open_run(tmp_path / "run")
    return done, record


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_processor(tmp_path_factory.mktemp("tokenizer"), SHAPE, TEXT)


def test_images_stand_in_the_tokens(tmp_path: Path, tokenizer: Path) -> None:
    _, record = take(tmp_path, document(URLS), tokenizer=tokenizer)
    assert len(record.turns) == 2
    assert [one for one in record.warnings if one.kind == "unproven"] == []
    hashes = [image["sha256"] for image in record.images]
    assert hashes == [picture_of(one, LIMITS).sha256 for one in PICTURES]
    assert record.tool_calls[0].images == hashes[1:]
    assert record.tool_calls[0].response == "Here."
    files = sorted(file.stem for file in (tmp_path / "run" / "images").iterdir())
    assert files == sorted(hashes)


@pytest.mark.parametrize("why", ["other tokens", "no processor"])
def test_where_they_do_not_fit_the_tokens_are_left_out(
    tmp_path: Path, tokenizer: Path, why: str
) -> None:
    given = {"cut": 1} if why == "other tokens" else {}
    options = {"tokenizer": tokenizer} if why == "other tokens" else {}
    _, record = take(tmp_path, document(URLS, **given), **options)
    assert (record.turns, record.prompt_ids, record.images) == ([], [], [])
    assert any("without token ids" in warning.text for warning in record.warnings)
    assert record.messages[0]["content"][0]["image"].startswith("sha256:")
    assert len(list((tmp_path / "run" / "images").iterdir())) == 2


def test_files_are_read_below_the_named_folder_alone(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(png_bytes(PICTURES[1]))
    (folder / "a.png").write_bytes(png_bytes(PICTURES[0]))
    (folder / "link.png").symlink_to(outside)
    paths = {
        "a.png": "only data URLs",
        str(folder / "a.png"): "only data URLs",
        "../secret.png": "outside",
        str(outside): "outside",
        "link.png": "outside",
        f"file://{outside}": "only data URLs",
        "https://example.org/a.png": "only data URLs",
        "missing.png": "no such image file",
        "data:image/png;base64,AAAA": "no image",
    }
    for number, (path, said) in enumerate(paths.items()):
        images = folder if number >= 2 else None
        with pytest.raises(ImportFileError, match=said):
            take(tmp_path, document([path, URLS[1]]), images=images)
        assert not (tmp_path / "run").exists()
    _, record = take(tmp_path, document(["a.png", URLS[1]]), images=folder)
    assert record.messages[0]["content"][0]["image"] == picture_of(PICTURES[0], LIMITS).reference


def test_a_document_of_too_many_images_is_a_defect(tmp_path: Path) -> None:
    found = document(URLS)
    found["steps"][0]["message"] = shown(URLS[0], "x")[:1] * (LIMITS.count + 1)
    with pytest.raises(ImportFileError, match="more than 64 images"):
        take(tmp_path, found)
