"""What an image costs beside text: CPU a turn, where it goes, and the longest block of the loop.

    python -m tests.bench.images [CONVERSATIONS]

Conversations of two turns with the scripted engine, each with one image of 512 tokens of its own
(448x896 pixels, a data URL in the task) in its prompt, into a run folder; beside the same without
the image. A block is CPU time of the loop's thread between two of its ticks, so other processes do
not count.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.loop.batch import run_tasks
from agent.loop.tasks import Task, row_task
from conversations.images.reading import Picture, read_picture
from conversations.images.sources import image_source
from conversations.run.hash_store import HashStore
from conversations.run.store import RunFolder
from tests.helpers import call, says
from tests.vision import (
    LIMITS,
    Camera,
    drawn,
    picture_of,
    vision_manifest,
    vision_runtime,
    vision_template,
)

SIZE = (448, 896)
TURNS = [call("camera", sizes=[], text="Nothing there."), "It is a cat."]


def main(count: int) -> None:
    template = vision_template("qwen2_5_vl", "hermes")
    assert template.images is not None
    settings = dict(template.images.settings)
    settings["max_pixels"] = 1024 * 28 * 28
    object.__setattr__(template.images, "max_pixels", settings["max_pixels"])
    grid = template.images.grid(*SIZE)
    print(f"an image of {SIZE[0]}x{SIZE[1]} pixels, {template.images.tokens(grid)} tokens")
    asyncio.run(measured(template, tasks(4, shown=True), watched=True))  # warm: imports, threads
    for shown in (False, True):
        given = tasks(count, shown=shown)
        cpu_s, _ = asyncio.run(measured(template, given, watched=False))
        _, block_s = asyncio.run(measured(template, given, watched=True))
        what = "with the image" if shown else "text only"
        each = 1000 * cpu_s / (count * len(TURNS))
        print(f"{what}: {each:.2f} ms CPU a turn, longest block {1000 * block_s:.2f} ms")
    parts(template)


def tasks(count: int, *, shown: bool) -> list[Task]:
    found = []
    for number in range(count):
        rng = random.Random(number)
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": "What is it?"}]}
        if shown:
            row["prompt"][0]["content"] = "<image>What is it?"
            row["images"] = [picture_of(noisy(rng), LIMITS).data_url()]
        found.append(row_task(row, f"t{number}"))
    return found


def noisy(rng: random.Random) -> Any:
    """A picture that compresses as a photo does, not as a drawing."""
    from PIL import Image

    coarse = Image.frombytes("RGB", (112, 224), rng.randbytes(112 * 224 * 3))
    return Image.blend(drawn(rng, SIZE), coarse.resize(SIZE), 0.3)


async def measured(template: Any, given: list[Task], *, watched: bool) -> tuple[float, float]:
    """CPU seconds of the process, and the longest block of this thread if it is watched, which
    costs CPU itself.
    """
    longest, over = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not over:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)

    shared = vision_runtime(template, says(template, *(TURNS * len(given))), [Camera()])
    with (
        tempfile.TemporaryDirectory() as folder,
        RunFolder.create(Path(folder) / "run", vision_manifest(template)) as store,
    ):
        watcher = asyncio.create_task(watch()) if watched else None
        await asyncio.sleep(0)
        longest, begun = 0.0, time.process_time()
        await run_tasks(given, shared, store=store, max_concurrent=1)
        over = True
        cpu_s = time.process_time() - begun
        if watcher:
            await watcher
    return cpu_s, longest


def parts(template: Any) -> None:
    """Where one image's CPU goes; the first three run in a thread."""
    url = picture_of(noisy(random.Random(1)), LIMITS).data_url()
    picture: Picture = image_source(url).read(LIMITS)
    pieces = template.prompt(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], []
    )
    grid = template.images.grid(*SIZE)
    with tempfile.TemporaryDirectory() as folder:
        store = HashStore(Path(folder), ".png")
        steps = {
            "decode, flatten, encode as PNG": lambda: read_picture(picture.png, LIMITS),
            "data URL for the engine": picture.data_url,
            "hash and write the file": lambda: (store.put(picture.png), _emptied(store)),
            "expand the placeholder": lambda: template.place(pieces, [grid]),
        }
        for name, step in steps.items():
            begun = time.process_time()
            for _ in range(20):
                step()
            print(f"  {name}: {50 * (time.process_time() - begun):.2f} ms")


def _emptied(store: HashStore) -> None:
    for file in store.folder.iterdir():
        file.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
