"""Images: their files, what the processor makes of their sizes, their places in the tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding, differs, quoted
from conversations.checks.tokens import turn_at
from conversations.errors import ImageError, RunFolderError
from conversations.images.processor import PLACEHOLDER, ImageProcessor
from conversations.messages import image_parts
from conversations.run.hash_store import HashStore
from conversations.run.open_run import MOST_BYTES
from conversations.tokens import PROMPT, TOOL, USER
from conversations.trajectory import Trajectory

_PNG = b"\x89PNG\r\n\x1a\n"


def image_findings(trajectory: Trajectory, facts: RunFacts) -> Iterator[Finding]:
    """What is wrong with a record's images."""
    shown = [str(part["image"]) for part in image_parts(trajectory.messages)]
    images = trajectory.images
    if trajectory.prompt_ids:
        listed = [f"sha256:{image['sha256']}" for image in images]
        if shown != listed:
            yield Finding(differs("the images of the messages", shown, listed))
    processor = facts.template.images if facts.template else None
    if images and facts.template and processor is None:
        yield Finding("there are images, and run.json names no image processor")
    for number, image in enumerate(images):
        for problem in _file_problems(image, facts.images):
            yield Finding(f"image {number}: {problem}")
        if processor:
            for problem in _size_problems(image, processor):
                yield Finding(f"image {number}: {problem}", token=image["start"])
    yield from _place_findings(trajectory, processor)
    answered = {sha256 for line in trajectory.tool_calls for sha256 in line.images}
    for sha256 in sorted(answered - {image["sha256"] for image in images}):
        if problem := _problem(facts.images, sha256):
            yield Finding(f"an image of a tool: {problem}")


def unplaced_grids(
    hashes: Sequence[str], processor: ImageProcessor, store: HashStore | None
) -> list[tuple[int, int, int]]:
    """The grids of images that no token stands for. Raises ImageError if a file cannot be read."""
    sizes = [_size(store, sha256) for sha256 in hashes]
    return [processor.grid(*size) for size in sizes]


def _file_problems(image: dict[str, Any], store: HashStore | None) -> Iterator[str]:
    if problem := _problem(store, image["sha256"]):
        yield problem
        return
    found, size = _size(store, image["sha256"]), (image["width"], image["height"])
    if found != size:
        yield differs("its size in pixels", size, found)


def _size_problems(image: dict[str, Any], processor: ImageProcessor) -> Iterator[str]:
    try:
        grid = list(processor.grid(image["width"], image["height"]))
    except ImageError as error:
        yield str(error)
        return
    if image["grid"] != grid:
        yield differs("its grid", image["grid"], grid)
    count = image["end"] - image["start"]
    if count != processor.tokens(grid):
        yield differs("its number of tokens", count, processor.tokens(grid))


def _place_findings(trajectory: Trajectory, processor: ImageProcessor | None) -> Iterator[Finding]:
    """Images lie in order in tokens that nobody sampled, and these are all placeholders."""
    ids, position = trajectory.prompt_ids + trajectory.response_ids, 0
    mask = [0] * len(trajectory.prompt_ids) + trajectory.response_mask
    covered = 0
    for number, image in enumerate(trajectory.images):
        start, end = image["start"], image["end"]
        if not position <= start < end <= len(ids):
            where = f"[{start}, {end})"
            yield Finding(f"image {number}: its tokens {where} overlap or lie outside", token=start)
            return
        position = end
        covered += end - start
        kinds = [kind for kind, first, stop in trajectory.segments if first <= start < stop]
        if not set(kinds) <= {PROMPT, TOOL, USER} or any(mask[start:end]):
            yield Finding(f"image {number}: its tokens are of kind {quoted(kinds)}", token=start)
        if processor and set(ids[start:end]) != {processor.placeholder_id}:
            yield Finding(f"image {number}: its tokens are not all {PLACEHOLDER}", token=start)
    if processor is None or trajectory.error is not None:
        return  # a conversation ends with an error if the model samples a placeholder
    if (found := ids.count(processor.placeholder_id)) != covered:
        token = ids.index(processor.placeholder_id)
        what = differs(f"the number of {PLACEHOLDER} tokens", found, covered)
        yield Finding(what, turn_at(trajectory, token), token)


def _problem(store: HashStore | None, sha256: str) -> str:
    return "the run folder is not known" if store is None else _checked(store.folder, sha256)[0]


def _size(store: HashStore | None, sha256: str) -> tuple[int, int]:
    problem, size = ("", (0, 0)) if store is None else _checked(store.folder, sha256)
    if problem:
        raise ImageError(problem)
    return size


@functools.lru_cache(1 << 14)
def _checked(folder: Path, sha256: str) -> tuple[str, tuple[int, int]]:
    """What is wrong with a file, and the size that its header states. Read once: samples share."""
    try:
        data = HashStore(folder, ".png").read(sha256, most=MOST_BYTES)
    except RunFolderError as error:
        return str(error), (0, 0)
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 24:
        return f"{sha256}.png is no PNG file", (0, 0)
    return "", (int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))
