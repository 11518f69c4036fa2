"""A session with branches in a real browser: the tree, a branch's page, what a search finds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.browser import tab
from tests.conversations.pages import write_page
from tests.conversations.session.sessions import session_run
from tests.helpers import hermes_template

pytestmark = pytest.mark.asyncio(loop_scope="session")

TREE = "[...document.querySelectorAll('.branches .branch a')].map(one => one.textContent)"
OPEN = "[...document.querySelectorAll('.branches details')].map(one => one.open)"
TEXT = "document.querySelector('.conversation').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    return write_page(session_run(folder / "run", hermes_template()), folder / "page.html")


async def test_branches_stand_in_a_tree_folded_until_one_is_opened(
    browser: Any, page: Path
) -> None:
    async with tab(browser, page, "#/t/t-0") as opened:
        await opened.until("document.querySelector('.branches')")
        names = await opened.page.evaluate(TREE)
        assert names[0] == "trunk"
        assert {name.split()[1] for name in names[1:]} == {
            "resampled", "rewritten", "edited", "dropped", "new", "system", "tools"
        }  # fmt: skip
        assert not any(await opened.page.evaluate(OPEN))
        assert "Branch 1 departs here: resampled" in await opened.page.evaluate(TEXT)
        if folder := os.environ.get("TURNTRACE_SCREENSHOTS"):
            await opened.page.screenshot(path=f"{folder}/session.png")
        await opened.page.evaluate("document.querySelector('.departs a').click()")
        await opened.until("location.hash.endsWith('/b1')")
        await opened.until("document.querySelector('.branch[aria-current] a')?.textContent"
                           " === '1 resampled'")  # fmt: skip
        assert "Another sample." in await opened.page.evaluate(TEXT)
        assert await opened.page.evaluate("document.querySelector('.parents').open") is False
        parents = await opened.text(".parents summary")
        assert "trunk" in parents
        assert "in this branch" in await opened.text(".facts div:nth-child(2) dd")
        assert (await opened.page.evaluate(OPEN))[0] is True
        if folder := os.environ.get("TURNTRACE_SCREENSHOTS"):
            await opened.page.screenshot(path=f"{folder}/branch.png")


async def test_a_branch_has_its_tokens_and_an_address(browser: Any, page: Path) -> None:
    async with tab(browser, page, "#/t/t-0/b3/tokens") as opened:
        await opened.until("document.querySelector('.tokens')")
        text = await opened.page.evaluate("document.querySelector('.tokens').textContent")
        assert "Be" in text
    async with tab(browser, page, "#/t/t-0/b99") as opened:
        await opened.until("document.querySelector('.branches')")
        current = "document.querySelector('.branch[aria-current] a').textContent"
        assert await opened.page.evaluate(current) == "trunk"


async def test_a_search_finds_what_a_branch_says(browser: Any, page: Path) -> None:
    async with tab(browser, page, "#/list?q=SYSTEM!") as opened:
        await opened.until("document.getElementById('grid').getAttribute('aria-busy') !== 'true'")
        assert (await opened.page.evaluate("document.querySelector('#count').textContent"))[
            0
        ] == "1"
