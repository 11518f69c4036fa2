"""Pictures on the page, in a real browser: in their place, whole in a dialog, boxed where a tool
cropped.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from agent.loop.tasks import row_task
from conversations.run.store import image_store
from tests.browser import tab
from tests.conversations.pages import write_page
from tests.helpers import call, says
from tests.vision import run_into, vision_runtime, vision_template
from tools.image_zoom import ImageZoomInTool

pytestmark = pytest.mark.asyncio(loop_scope="session")

IMAGES = "[...document.querySelectorAll('.conversation img')]"
LOADED = f"{IMAGES}.length > 0 && {IMAGES}.every(image => image.complete && image.naturalWidth)"


def zoom_tool() -> ImageZoomInTool:
    function = {"name": "image_zoom_in_tool", "description": "Zooms.", "parameters": {}}
    return ImageZoomInTool({}, {"type": "function", "function": function})


def diagram() -> Any:
    """A triangle with its sides named."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (392, 280), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon([(40, 240), (350, 240), (350, 60)], outline="black", width=3)
    draw.text((190, 250), "12", fill="black", font_size=20)
    draw.text((360, 140), "5", fill="black", font_size=20)
    draw.text((165, 120), "x", fill="black", font_size=20)
    return image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = vision_template("qwen2_5_vl", "hermes")
    row = {"prompt": [{"role": "user", "content": "<image>How long is x?"}], "images": [diagram()]}
    box = call("image_zoom_in_tool", bbox_2d=[150, 100, 230, 160], label="x")
    engine = says(template, f"I look at it.\n{box}", "5 and 12: x is 13.")
    folder = tmp_path_factory.mktemp("pictures")
    shared = vision_runtime(template, engine, [zoom_tool()])
    [record] = asyncio.run(run_into(folder / "run", shared, [row_task(row, "triangle")]))
    assert record.error is None
    assert len(record.images) == 2
    return folder / "run"


async def test_pictures_are_shown_zoomed_and_boxed(browser: Any, run: Path) -> None:
    page = write_page(run, run.parent / "page.html")
    async with tab(browser, page, "#/t/triangle-0") as opened:
        await opened.until(LOADED)
        sizes = await opened.page.evaluate(
            f"{IMAGES}.map(image => [image.naturalWidth, image.naturalHeight])"
        )
        assert sizes == [[392, 280], [80, 60], [392, 280]]  # task, crop, where it was cropped
        place = await opened.page.evaluate(
            "(() => { const box = document.querySelector('.cropped .box').getBoundingClientRect();"
            " const all = document.querySelector('.cropped img').getBoundingClientRect();"
            " return [(box.left - all.left) / all.width, (box.top - all.top) / all.height,"
            " box.width / all.width, box.height / all.height]; })()"
        )
        expected = [150 / 392, 100 / 280, 80 / 392, 60 / 280]
        assert place == pytest.approx(expected, abs=0.02)
        if shot := os.environ.get("TURNTRACE_SCREENSHOT"):
            await opened.page.screenshot(path=shot, full_page=True)
        await opened.page.locator(".cropped .thumb").first.click()
        await opened.until("document.querySelector('dialog.whole-picture[open] img').complete")
        await opened.page.keyboard.press("Escape")
        await opened.until("!document.querySelector('dialog.whole-picture')")


async def test_a_changed_file_is_not_shown(browser: Any, run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for file in image_store(copy).folder.iterdir():
        file.write_bytes(b"<script>alert(1)</script>")
    page = write_page(copy, tmp_path / "page.html")
    async with tab(browser, page, "#/t/triangle-0") as opened:
        await opened.until("document.querySelectorAll('.picture').length === 3")
        assert await opened.page.evaluate(f"{IMAGES}.length") == 0
        assert "not in this page" in await opened.text(".picture")
