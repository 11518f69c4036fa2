"""Records that want to do harm: nothing of them runs, nothing breaks, all of them can be looked
at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversations.run.open_run import open_run
from conversations.trajectory import canonical_json
from tests.browser import Tab, tab
from tests.conversations.pages import Record, changed_run, write_page, write_run
from tests.conversations.synthetic import make_run

pytestmark = pytest.mark.asyncio(loop_scope="session")

RAN = "globalThis.pwned"
MARKUP = [
    "<script>globalThis.pwned = 1; alert(1)</script>",
    "</script><script>globalThis.pwned = 1</script>",
    "</style><img src=x onerror='globalThis.pwned = 1'>",
    "--></title></textarea></noscript><svg onload=globalThis.pwned=1>",
    '"><a href="javascript:globalThis.pwned=1" autofocus onfocus=globalThis.pwned=1>x</a>',
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe><base href='https://evil.invalid/'>",
    "<meta http-equiv=refresh content='0;url=https://evil.invalid/'><link rel=stylesheet href=https://evil.invalid/x.css>",
    "{{ 7 * 7 }} {% for x in y %} ${globalThis.pwned = 1} `${alert(1)}`",
    "]]>&lt;script&gt;&#x3C;script&#x3E; \\u003cscript\\u003e <!--<script>",
]
UNICODE = [
    "\ud83d lone \udc00 surrogates \udbff",
    "nul \x00 bell \x07 escape \x1b[2J\x1b]0;title\x07 delete \x7f c1 \x9b31m",
    "bidi \u202eesrever\u202c \u2066isolate\u2069 \u200e\u200f\u061c",
    "separators \u2028\u2029 bom \ufeff nbsp \u00a0 zero\u200bwidth joiners \u200d",
    "e" + "\u0301" * 5000,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U000e0001 \ufdd0 \uffff",
]
WORDS = [*MARKUP, *UNICODE, "__proto__", "constructor", "toString", "", " ", "javascript:alert(1)"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("hostile") / "plain", 24)


def poison(value: Any, text: str) -> Any:
    """Every text in a value replaced, keys of objects that a record leaves open included."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return (
        {key: poison(item, text) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def poisoned(record: Record, number: int, text: str) -> Record:
    """A record that says `text` wherever it may say anything at all."""
    task = f"{text} {number}"
    for message in record["messages"]:
        message["content"] = text
        if isinstance(message.get("raw"), str):
            message["raw"] = text
            message["reasoning_content"] = text
    for call in record["tool_calls"]:
        call |= {
            "name": text,
            "status": text,
            "response": text,
            "full_response": text,
            "error": text,
        }
        call |= {"arguments": {text: text, "__proto__": {text: [text]}}, "metrics": {text: text}}
        call["attempts"] = [
            {**attempt, "status": text, "error": text} for attempt in call["attempts"]
        ] * 2
    segments = [[text, 0, 5], *record["segments"][1:]]
    more = {
        "error": text,
        "warnings": [{"kind": text, "text": text}],
        "ground_truth": text,
        "extra": {text: text},
        "reward_parts": {text: 1.0, "__proto__": 2},
    }
    rest = {
        "stop_reason": text,
        "tools": poison(record["tools"], text),
        "engine": {text: text},
        "data_source": text,
        "parent": {"run": text},
    }
    turns = [{**turn, "finish_reason": text, "weight_version": text} for turn in record["turns"]]
    return {
        **record,
        **more,
        **rest,
        "turns": turns,
        "segments": segments,
        "task_id": task,
        "sample": 0,
        "id": f"{task}-0",
    }


async def look_everywhere(opened: Tab, row: int) -> None:
    """Every view of one trajectory, and every part that opens."""
    for view in (
        f"t/@{row}",
        f"t/@{row}/tokens",
        f"t/@{row}/record",
        f"t/@{row}/group",
        f"t/@{row}/diff",
    ):
        await opened.page.evaluate(f"location.hash = '#/{view}'")
        await opened.until(f"location.hash.includes('@{row}') || location.hash.includes('/t/')")
        await opened.until("document.querySelector('#detail .body')?.childElementCount")
        await opened.page.evaluate(
            "document.querySelectorAll('#detail details').forEach(e => { e.open = true; })"
        )
        await opened.page.evaluate(
            "document.querySelector('#detail .token')"
            "?.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
        )
    assert await opened.page.evaluate(RAN) is None


async def test_nothing_that_a_record_says_is_run_or_fetched(
    browser: Any, plain: Path, tmp_path: Path
) -> None:
    sources = list(open_run(plain).records())
    records = [
        poisoned(json.loads(json.dumps(sources[n % len(sources)])), n, text)
        for n, text in enumerate(WORDS)
    ]
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", plain, records)
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    hostile = {text: text for text in WORDS[:-4]}
    (run / "run.json").write_text(
        json.dumps({**poison(manifest, MARKUP[0]), "schema": manifest["schema"], **hostile}),
        encoding="utf-8",
    )
    page = write_page(run, tmp_path / "page.html", against=run)
    async with tab(browser, page) as opened:
        for row in range(len(WORDS)):
            await look_everywhere(opened, row)
        for view in ("plots", "run", "list"):
            await opened.page.evaluate(f"location.hash = '#/{view}'")
            await opened.page.wait_for_timeout(100)
        await opened.page.fill("#search", MARKUP[0])
        await opened.until("document.getElementById('count').textContent.startsWith('1 of')")
        assert await opened.page.evaluate(RAN) is None
        assert (
            await opened.page.evaluate(
                "document.querySelectorAll('iframe, img, base, link, object, embed').length"
            )
            == 0
        )
        assert await opened.page.evaluate(
            "[...document.links].every(link => link.getAttribute('href').startsWith('#'))"
        )


async def test_what_acts_in_a_text_is_shown_instead(
    browser: Any, plain: Path, tmp_path: Path
) -> None:
    def says(number: int, record: Record) -> None:
        record["messages"][0]["content"] = UNICODE[number % 3]

    page = write_page(changed_run(tmp_path / "run", plain, says), tmp_path / "page.html")
    async with tab(browser, page) as opened:
        for row, expected in enumerate(
            (
                "⟨U+D83D⟩ lone ⟨U+DC00⟩ surrogates ⟨U+DBFF⟩",
                "nul ␀ bell ␇ escape ␛[2J␛]0;title␇ delete ␡ c1 ⟨U+009B⟩31m",
                "bidi ⟨U+202E⟩esrever⟨U+202C⟩ ⟨U+2066⟩isolate⟨U+2069⟩ ⟨U+200E⟩⟨U+200F⟩⟨U+061C⟩",
            )
        ):
            await opened.page.evaluate(f"location.hash = '#/t/@{row}'")
            await opened.until(
                "document.querySelector('#detail .message .text')"
                f"?.textContent === {json.dumps(expected)}"
            )


async def test_huge_and_deep_things_are_cut_until_asked_for(
    browser: Any, plain: Path, tmp_path: Path
) -> None:
    big = "<b>line of the tool's output</b>\n" * 160_000 + "the end"
    deep: Any = "the core"
    for _ in range(900):
        deep = {"a": [deep]} if len(canonical_json(deep)) % 2 else {"<i>": deep}
    records = list(open_run(plain).records())
    called = next(
        record
        for record in records
        if record["tool_calls"] and record["tool_calls"][0]["status"] == "ok"
    )
    called["tool_calls"][0] |= {
        "full_response": big,
        "arguments": {"deep": deep, "wide": {str(n): n for n in range(20_000)}},
    }
    long_id = "x" * 100_000
    records[0] |= {"task_id": long_id, "sample": 0, "id": f"{long_id}-0"}
    page = write_page(write_run(tmp_path / "run", plain, records), tmp_path / "page.html")
    async with tab(browser, page, f"#/t/{called['id']}") as opened:
        await opened.page.locator(".whole summary").first.click()
        await opened.until("document.querySelector('.whole .more')")
        assert len(await opened.page.locator(".whole .text").first.text_content() or "") < 21_000
        assert await opened.text(".whole .more") == f"Show all {len(big):,} characters"
        await opened.page.click(".whole .more")
        assert await opened.page.evaluate(
            "document.querySelector('.whole .text').textContent.length"
        ) == len(big)
        await opened.page.evaluate(
            "document.querySelectorAll('#detail .argument .more').forEach(button => button.click())"
        )
        assert await opened.page.evaluate(
            "document.querySelector('#detail .arguments').textContent.includes('the core')"
        )
        await opened.page.evaluate("location.hash = '#/t/@0'")
        await opened.until("document.querySelector('#detail h2')?.textContent.startsWith('xxxxx')")
        assert len(opened.page.url) < 1000
        await opened.page.fill("#search", "the end")
        await opened.until("document.getElementById('count').textContent.startsWith('1 of')")


async def test_tokens_that_are_none_are_shown_as_they_are(
    browser: Any, plain: Path, tmp_path: Path
) -> None:
    odd: list[Any] = [-1, 10**9, 2**53 + 1, 10**30, 0, None, "<b>7</b>", 1.5, [1], {"a": 1}, True]

    def says(number: int, record: Record) -> None:
        record |= {"prompt_ids": [5, 5], "response_ids": odd, "response_mask": [1] * len(odd)}
        record |= {
            "response_logprobs": [-1.0, None, 0, 1e308, -1e-45, 5.0, *[None] * 5],
            "segments": [["nobody", 0, 4], ["sampled", 3, 99]],
        }

    def lists(number: int, record: Record) -> None:
        says(number, record)
        record |= {
            "response_logprobs": ["<b>", {}, None],
            "response_mask": ["<b>"],
            "segments": [],
            "turns": [],
        }

    for change in (says, lists):
        run = changed_run(tmp_path / change.__name__, plain, change)
        page = write_page(run, tmp_path / "page.html", limit=3)
        async with tab(browser, page, "#/t/@1/tokens") as opened:
            await opened.until(f"document.querySelectorAll('.token').length === {2 + len(odd)}")
            await look_everywhere(opened, 1)
            await opened.page.evaluate("location.hash = '#/t/@1/tokens'")
            await opened.until(f"document.querySelectorAll('.token').length === {2 + len(odd)}")
            for position in range(2 + len(odd)):
                await opened.page.locator(".token").nth(position).hover()


async def test_a_damaged_page_says_so(browser: Any, plain: Path, tmp_path: Path) -> None:
    whole = write_page(plain, tmp_path / "page.html").read_text(encoding="utf-8")
    cut = tmp_path / "cut.html"
    cut.write_text(whole[: whole.index('id="block-0"') + 2000], encoding="utf-8")
    async with tab(browser, cut) as opened:
        await opened.page.keyboard.press("Enter")
        await opened.until(
            "document.querySelector('#detail .notice')?.textContent.includes('cannot be shown')"
        )
    broken = tmp_path / "broken.html"
    broken.write_text(whole.replace('id="summary">', 'id="summary">!'), encoding="utf-8")
    async with tab(browser, broken) as opened:
        assert "cannot be shown" in await opened.text("#notice")
