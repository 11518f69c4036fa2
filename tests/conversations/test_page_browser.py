"""The page in a real browser: what it shows is what the records say, by mouse, by keyboard and
by address."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from conversations.run.open_run import open_run
from conversations.run.scores import score_line, write_scores
from tests.browser import Tab, tab
from tests.conversations.pages import Record, changed_run, write_page
from tests.conversations.synthetic import make_run

pytestmark = pytest.mark.asyncio(loop_scope="session")

N = 400
DRAWN = "[...document.querySelectorAll('#space .row')].filter(row => !row.hidden).length"
SELECTED = "document.querySelector('#space .row[aria-selected=true] .c-id').textContent"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations out of the loop, again and again; each with a wall time of its own."""
    folder = tmp_path_factory.mktemp("browser")

    def timed(number: int, record: Record) -> None:
        record["wall_s"] = 1.0 + (number * 37) % N / 100

    return changed_run(folder / "run", make_run(folder / "made", N, distinct=40), timed)


@pytest.fixture(scope="module")
def records(run: Path) -> list[Record]:
    return list(open_run(run).records())


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_page(run, run.parent / "page.html")


def calls_of(record: Record) -> set[str]:
    return {call["status"] for call in record["tool_calls"]}


async def count(opened: Tab) -> int:
    """What the list says it has left."""
    await opened.until("document.getElementById('grid').getAttribute('aria-busy') !== 'true'")
    return int((await opened.text("#count")).split()[0].replace(",", ""))


async def listed(opened: Tab) -> list[str]:
    """The ids in sight, from the top."""
    drawn = (
        "[...document.querySelectorAll('#space .row')]"
        ".filter(r => !r.hidden).sort((a, b) => a.place - b.place)"
    )
    found: list[str] = await opened.page.evaluate(
        f"{drawn}.map(row => row.querySelector('.c-id').textContent)"
    )
    return found


# ---------------------------------------------------------------------- the list


async def test_the_list_has_every_trajectory_and_makes_only_the_rows_in_sight(
    browser: Any, page: Path, records: list[Record]
) -> None:
    async with tab(browser, page) as opened:
        assert await count(opened) == N
        ids = [record["id"] for record in records]
        assert (await listed(opened))[:5] == ids[:5]
        assert await opened.page.evaluate(DRAWN) < 60
        await opened.page.evaluate("document.getElementById('grid').scrollTop = 1e9")
        await opened.until(
            "[...document.querySelectorAll('#space .c-id')]"
            f".some(cell => cell.textContent === {json.dumps(ids[-1])})"
        )
        assert await opened.page.evaluate(DRAWN) < 60


@pytest.mark.parametrize(
    ("query", "keeps"),
    [
        ("stop=length", lambda r: r["stop_reason"] == "length"),
        ("stop=length,stop", lambda r: r["stop_reason"] in ("length", "stop")),
        ("status=malformed", lambda r: "malformed" in calls_of(r)),
        (
            "status=malformed,unknown_tool",
            lambda r: bool({"malformed", "unknown_tool"} & calls_of(r)),
        ),
        ("reward=0.5..0.5", lambda r: r["reward"] == 0.5),
        ("reward=..0", lambda r: r["reward"] is not None and r["reward"] <= 0),
        ("length=200..", lambda r: len(r["response_ids"]) >= 200),
        ("only=infra", lambda r: r["infra_error"]),
        ("only=clean", lambda r: calls_of(r) <= {"ok"}),
        ("only=warned", lambda r: bool(r["warnings"])),
        (
            "stop=stop&status=ok&length=..300",
            lambda r: (
                r["stop_reason"] == "stop" and "ok" in calls_of(r) and len(r["response_ids"]) <= 300
            ),
        ),
        (
            "q=division by zero",
            lambda r: any("division by zero" in str(m["content"]) for m in r["messages"]),
        ),
        (
            "q=FACT 3 about 漢字",
            lambda r: any("fact 3 about 漢字" in str(c) for c in r["tool_calls"]),
        ),
        (
            'q={"op":',
            lambda r: any('{"op":' in str(m.get("raw")) + str(m["content"]) for m in r["messages"]),
        ),
        ("q=apples-000007", lambda r: r["task_id"] == "apples-000007"),
        ("q=nowhere to be found", lambda r: False),
    ],
)
async def test_a_filter_keeps_what_it_says(
    browser: Any, page: Path, records: list[Record], query: str, keeps: Any
) -> None:
    wanted = [record["id"] for record in records if keeps(record)]
    async with tab(browser, page, f"#/list?{quote(query, safe='=&,.')}") as opened:
        assert await count(opened) == len(wanted)
        assert (await listed(opened))[:20] == wanted[:20]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("Reward", lambda r: r["reward"]),
        ("Tokens", lambda r: len(r["response_ids"])),
        ("Time", lambda r: r["wall_s"]),
    ],
)
async def test_a_click_on_a_column_sorts_both_ways_and_back(
    browser: Any, page: Path, records: list[Record], column: str, value: Any
) -> None:
    async with tab(browser, page) as opened:
        button = opened.page.locator(".head button", has_text=column)
        by_id = {record["id"]: value(record) for record in records}
        known = [one for one in by_id.values() if one is not None]
        for expected in (sorted(known, reverse=True), sorted(known)):
            await button.click()
            assert [by_id[name] for name in (await listed(opened))[:20]] == expected[:20]
        await button.click()
        assert (await listed(opened))[:5] == [record["id"] for record in records][:5]


async def test_menus_filter_and_the_address_follows(
    browser: Any, page: Path, records: list[Record]
) -> None:
    async with tab(browser, page) as opened:
        await opened.page.locator("summary", has_text="Stop reason").click()
        await opened.page.get_by_label("max_turns").check()
        assert "stop=max_turns" in opened.page.url
        assert await count(opened) == sum(
            record["stop_reason"] == "max_turns" for record in records
        )
        await opened.page.locator("summary", has_text="Reward").click()
        await opened.page.get_by_label("Reward, from").fill("0.5")
        await opened.page.keyboard.press("Tab")
        assert await count(opened) == sum(
            r["stop_reason"] == "max_turns" and (r["reward"] or 0) >= 0.5 for r in records
        )
        await opened.page.reload()
        await opened.ready()
        assert await count(opened) == sum(
            r["stop_reason"] == "max_turns" and (r["reward"] or 0) >= 0.5 for r in records
        )
        await opened.page.get_by_role("button", name="Clear").click()
        assert await count(opened) == N


# ---------------------------------------------------------------------- by keyboard


async def test_the_whole_way_by_keyboard(browser: Any, page: Path, records: list[Record]) -> None:
    async with tab(browser, page) as opened:
        keys = opened.page.keyboard
        ids = [record["id"] for record in records]
        for key, place in (("j", 1), ("j", 2), ("k", 1), ("End", N - 1), ("Home", 0), ("j", 1)):
            await keys.press(key)
            assert await opened.page.evaluate(SELECTED) == ids[place]
        await keys.press("Enter")
        await opened.until("document.querySelector('#detail .message')")
        assert await opened.text("#detail h2") == ids[1]
        await keys.press("j")
        await opened.until(
            f"document.querySelector('#detail h2')?.textContent === {json.dumps(ids[2])}"
        )
        await keys.press("t")
        await opened.until("document.querySelector('#detail .token')")
        assert opened.page.url.endswith(f"#/t/{ids[2]}/tokens")
        await keys.press("g")
        await opened.until("document.querySelectorAll('#detail .column').length === 4")
        await keys.press("Escape")
        await opened.until("document.getElementById('detail').hidden")
        await keys.press("/")
        await keys.type(ids[9])
        assert await opened.until("document.getElementById('count').textContent === '1 of 400'")
        await keys.press("Escape")
        await keys.press("Escape")
        await keys.press("?")
        assert await opened.until("document.getElementById('help').open")
        await keys.press("Escape")
        assert await count(opened) == N


async def test_back_goes_back(browser: Any, page: Path, records: list[Record]) -> None:
    async with tab(browser, page, "#/list?stop=stop") as opened:
        await opened.page.keyboard.press("Enter")
        await opened.until("document.querySelector('#detail .message')")
        await opened.page.go_back()
        assert await opened.until("document.getElementById('detail').hidden")
        assert await count(opened) == sum(record["stop_reason"] == "stop" for record in records)


# ---------------------------------------------------------------------- one trajectory


async def test_a_conversation_shows_its_messages_and_each_call_with_its_answer(
    browser: Any, page: Path, records: list[Record]
) -> None:
    record = next(
        one
        for one in records
        if len(one["tool_calls"]) > 2 and {"ok", "malformed"} <= calls_of(one)
    )
    async with tab(browser, page, f"#/t/{record['id']}") as opened:
        await opened.until("document.querySelector('#detail .message')")
        roles = [
            message["role"]
            for message in record["messages"]
            if message["role"] != "tool" or "tool_call_id" not in message
        ]
        assert await opened.texts("#detail .message > header .role") == roles
        calls = await opened.texts("#detail .call")
        assert len(calls) == len(record["tool_calls"])
        for shown, call in zip(calls, record["tool_calls"], strict=True):
            assert call["status"] in shown
            assert (call["name"] or "(no name)") in shown
            assert " ".join(call["response"].split()) in " ".join(shown.split())


async def test_where_a_turn_was_gone_on_with_is_shown(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    def resumed(number: int, record: Record) -> None:
        record["turns"][0]["resumed"] = [[700, "step-3"], [710, None]]

    page = write_page(
        changed_run(tmp_path / "resumed", run, resumed), tmp_path / "page.html", limit=1
    )
    async with tab(browser, page, f"#/t/{next(iter(open_run(run).ids))}") as opened:
        await opened.until("document.querySelector('#detail .message')")
        shown = "resumed at token 700 (weights step-3) · resumed at token 710"
        assert any(shown in text for text in await opened.texts("#detail .message > header"))


async def test_thinking_is_folded_and_escaped_and_warnings_have_their_kind(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    thought = "<b>six</b> \x1b sevens"

    def thinks(number: int, record: Record) -> None:
        record["warnings"] = [{"kind": "other", "text": "look <here>"}]
        for message in record["messages"]:
            message["reasoning_content"] = thought

    page = write_page(changed_run(tmp_path / "run", run, thinks), tmp_path / "p.html", limit=1)
    async with tab(browser, page, f"#/t/{next(iter(open_run(run).ids))}") as opened:
        await opened.until("document.querySelector('.thinking summary')")
        assert await opened.page.locator(".thinking .text").count() == 0
        await opened.page.locator(".thinking summary").first.click()
        await opened.until("document.querySelector('.thinking .text')")
        shown = await opened.page.locator(".thinking .text").first.text_content()
        assert shown == thought.replace("\x1b", "\u241b")
        assert "other: look <here>" in await opened.page.locator(".remark").all_text_contents()


async def test_what_was_cut_for_the_model_is_there_in_full(
    browser: Any, page: Path, records: list[Record]
) -> None:
    record = next(
        one for one in records if any(call["full_response"] for call in one["tool_calls"])
    )
    full = next(call["full_response"] for call in record["tool_calls"] if call["full_response"])
    async with tab(browser, page, f"#/t/{record['id']}") as opened:
        await opened.page.locator(".whole summary").first.click()
        await opened.until("document.querySelector('.whole .text')")
        assert await opened.page.locator(".whole .text").first.text_content() == full


async def test_every_token_has_its_author_id_and_exact_log_prob(
    browser: Any, page: Path, records: list[Record]
) -> None:
    record = next(one for one in records if one["num_turns"] > 1 and not one["infra_error"])
    ids, start = record["prompt_ids"] + record["response_ids"], len(record["prompt_ids"])
    kinds = [kind for kind, first, last in record["segments"] for _ in range(first, last)]
    async with tab(browser, page, f"#/t/{record['id']}/tokens") as opened:
        await opened.until("document.querySelector('#detail .token')")
        assert (
            await opened.page.evaluate(
                "[...document.querySelectorAll('.token')].map(token => token.dataset.kind)"
            )
            == kinds
        )
        masks = ["p"] * start + [str(mask) for mask in record["response_mask"]]
        assert (
            await opened.page.evaluate(
                "[...document.querySelectorAll('.token')].map(token => token.dataset.mask)"
            )
            == masks
        )
        shown = await opened.page.evaluate(
            "[...document.querySelectorAll('.token')].map(token => token.textContent).join('')"
        )
        assert shown.replace("↵\n", "\n").startswith("<|im_start|>system\n")
        for position in (0, start - 1, start, start + 1, len(ids) - 1):
            await opened.page.locator(".token").nth(position).hover()
            card = dict(
                await opened.page.evaluate(
                    "[...document.querySelectorAll('#tip dl > div')]"
                    ".map(e => [e.children[0].textContent, e.children[1].textContent])"
                )
            )
            assert int(card["id"]) == ids[position]
            logprob = record["response_logprobs"][position - start] if position >= start else None
            assert (None if card["log-prob"] == "–" else float(card["log-prob"])) == logprob
            if logprob is not None:
                assert math.isclose(
                    float(card["probability"].rstrip("%")), 100 * math.exp(logprob), rel_tol=1e-5
                )


async def test_tokens_by_keyboard_and_by_address(
    browser: Any, page: Path, records: list[Record]
) -> None:
    record = records[0]
    position = len(record["prompt_ids"]) - 2
    async with tab(browser, page, f"#/t/{record['id']}/tokens/{position}") as opened:
        await opened.until("document.querySelector('.token.active')")
        assert (
            await opened.page.evaluate("document.querySelector('.token.active').position")
            == position
        )
        await opened.page.locator(".tokens").focus()
        await opened.page.keyboard.press("ArrowRight")
        assert (
            await opened.page.evaluate("document.querySelector('.token.active').position")
            == position + 1
        )
        await opened.page.keyboard.press("End")
        last = len(record["prompt_ids"] + record["response_ids"]) - 1
        assert (
            await opened.page.evaluate("document.querySelector('.token.active').position") == last
        )
        assert await opened.text("#detail h2") == record["id"]
        for mode in ("Mask", "Log-prob", "Author"):
            await opened.page.get_by_role("button", name=mode).click()
            assert await opened.page.get_attribute(".tokens", "data-mode") == mode.lower().replace(
                "-", ""
            )


async def test_characters_in_several_tokens_appear_once_whole(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    from tests.helpers import tokenizer_at

    ids = tokenizer_at(run / "tokenizer").encode("a🙂漢é", add_special_tokens=False)

    def odd(number: int, record: Record) -> None:
        record |= {
            "prompt_ids": [*ids, 10**9, ids[1]],
            "response_ids": [],
            "response_mask": [],
            "response_logprobs": [],
        }
        record |= {"segments": [["prompt", 0, len(ids) + 2]], "turns": []}

    page = write_page(changed_run(tmp_path / "odd", run, odd), tmp_path / "page.html", limit=1)
    async with tab(browser, page, f"#/t/{next(iter(open_run(run).ids))}/tokens") as opened:
        await opened.until("document.querySelector('.token')")
        texts = await opened.page.evaluate(
            "[...document.querySelectorAll('.token')].map(token => token.textContent)"
        )
        assert "".join(text for text in texts if not text.startswith(("‹", "⟨"))) == "a🙂漢é"
        assert texts[-2:] == ["⟨1000000000⟩", "‹F0 9F›"]


async def test_a_run_without_a_tokenizer_shows_ids(
    browser: Any, run: Path, tmp_path: Path, records: list[Record]
) -> None:
    bare = changed_run(tmp_path / "bare", run, lambda number, record: None)
    (bare / "tokenizer" / "tokenizer.json").unlink()
    async with tab(
        browser, write_page(bare, tmp_path / "page.html", limit=1), f"#/t/{records[0]['id']}/tokens"
    ) as opened:
        await opened.until("document.querySelector('.token')")
        assert await opened.text(".token") == f"⟨{records[0]['prompt_ids'][0]}⟩"
        assert "no tokenizer" in await opened.text(".token-view .notice")


async def test_the_record_tab_has_the_record(
    browser: Any, page: Path, records: list[Record]
) -> None:
    record = max(records, key=lambda one: len(one["response_ids"]))  # it is cut in the page
    async with tab(browser, page, f"#/t/{record['id']}/record") as opened:
        await opened.until("document.querySelector('#detail .text')")
        await opened.page.locator("#detail .more").click()
        shown = json.loads(await opened.page.locator("#detail .text.code").text_content())
        assert {key: shown[key] for key in shown if key != "response_logprobs"} == {
            key: value for key, value in record.items() if key != "response_logprobs"
        }


async def test_the_samples_of_a_task_stand_side_by_side(
    browser: Any, page: Path, records: list[Record]
) -> None:
    group = [record for record in records if record["task_id"] == "apples-000002"]
    async with tab(browser, page, "#/t/apples-000002-1/group") as opened:
        await opened.until("document.querySelectorAll('.column').length === 4")
        assert await opened.texts(".column > header a") == [
            f"sample {number}" for number in range(4)
        ]
        rewards = [
            "–" if record["reward"] is None else f"{record['reward']:g}"
            for record in sorted(group, key=lambda one: one["sample"])
        ]
        assert await opened.texts(".column > header .reward") == rewards


async def test_an_address_that_names_nothing_says_so(browser: Any, page: Path) -> None:
    for fragment in ("#/t/nobody-0", "#/t/%E0%A4%A", "#/t/@99999", "#/t/"):
        async with tab(browser, page, fragment) as opened:
            assert "no such trajectory" in await opened.text("#notice")
            assert await count(opened) == N


# ---------------------------------------------------------------------- plots, differences, looks


async def test_plots_follow_the_filters_and_a_bar_is_one(
    browser: Any, page: Path, records: list[Record]
) -> None:
    async with tab(browser, page, "#/plots") as opened:
        await opened.until("document.querySelectorAll('#plots .card').length >= 8")
        titles = await opened.texts("#plots figcaption b")
        assert {
            "Reward",
            "Stop reasons",
            "Turns",
            "Tokens after the prompt",
            "Tool calls by status",
            "Tool latency",
        } <= set(titles)
        calls = sum(len(record["tool_calls"]) for record in records)
        assert any(
            text.startswith(f"{calls:,} in all")
            for text in await opened.texts("#plots figcaption .meta")
        )
        await opened.page.locator(".name-bar", has_text="max_turns").click()
        assert await opened.until("!document.getElementById('list').hidden")
        assert await count(opened) == sum(
            record["stop_reason"] == "max_turns" for record in records
        )


async def test_a_replay_shows_where_it_first_differs(
    browser: Any, run: Path, tmp_path: Path, records: list[Record]
) -> None:
    changed: list[Record] = []

    def differs(number: int, record: Record) -> None:
        if number % 10 == 3 and record["response_ids"]:
            record["response_ids"][-1] += 1
            changed.append(record)
            for call in record["tool_calls"][:1]:
                call["response"] = "something else"

    other = changed_run(tmp_path / "replay", run, differs)
    page = write_page(other, tmp_path / "page.html", against=run)
    record = next(one for one in changed if one["tool_calls"])
    async with tab(browser, page, "#/list?only=differs") as opened:
        assert await count(opened) == len(changed)
        assert "≠" in (await opened.texts("#space .row .flag"))[0]
        await opened.page.evaluate(f"location.hash = '#/t/{record['id']}/diff'")
        await opened.until("document.querySelectorAll('.difference .column').length === 2")
        position = len(record["prompt_ids"] + record["response_ids"]) - 1
        assert f"position {position:,}, turn {len(record['turns'])}" in await opened.text(
            ".verdict"
        )
        assert len(await opened.texts(".parting .token.parts")) == 2
        assert "something else" in await opened.text("table.plain")
    same = next(one["id"] for one in records if one["id"] not in {other["id"] for other in changed})
    async with tab(browser, page, f"#/t/{same}/diff") as opened:
        await opened.until("document.querySelector('.verdict')")
        assert await opened.text(".verdict") == "All tokens are the same."


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_stand_out_from_their_background(
    browser: Any, page: Path, records: list[Record], scheme: str
) -> None:
    """WCAG AA: 4.5 to 1, for each text of each view, tokens in their three colourings included."""
    long = max(records, key=lambda record: record["num_turns"])
    async with tab(browser, page, "#/list", color_scheme=scheme) as opened:
        for view in (
            "list",
            "plots",
            "run",
            f"t/{long['id']}",
            f"t/{long['id']}/group",
            f"t/{long['id']}/tokens",
        ):
            await opened.page.evaluate(f"location.hash = '#/{view}'")
            await opened.page.wait_for_timeout(300)
            assert await opened.page.evaluate(FAINT) == []
        for mode in ("mask", "logprob"):
            await opened.page.locator(f".segmented [data-mode={mode}]").click()
            assert await opened.page.evaluate(FAINT) == []


FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const curve = (part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const linear = (part) => curve(part / 255);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgba('white');
  };
  const found = new Set();
  for (const e of document.querySelectorAll('body *')) {
    const says = [...e.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!says || !e.checkVisibility() || e.closest('script, style, button:disabled')) continue;
    const style = getComputedStyle(e);
    const own = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(rgba(own)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${e.tagName}.${e.className.baseVal ?? e.className} ${e.dataset.bin ?? ''}`;
    if (ratio < 4.5) found.add(`${name} ${ratio.toFixed(2)}`);
  }
  return [...found];
}"""


async def test_the_theme_is_a_choice_that_lasts(browser: Any, page: Path) -> None:
    async with tab(browser, page) as opened:
        background = "getComputedStyle(document.documentElement).backgroundColor"
        assert await opened.page.evaluate(background) == "rgb(255, 255, 255)"
        await opened.page.click("#theme")
        await opened.page.click("#theme")
        assert await opened.page.evaluate(background) == "rgb(19, 19, 18)"
        await opened.page.reload()
        await opened.ready()
        assert await opened.page.evaluate(background) == "rgb(19, 19, 18)"


@pytest.mark.parametrize("width", [360, 700, 1000, 1440])
async def test_no_view_is_wider_than_the_window(
    browser: Any, page: Path, records: list[Record], width: int
) -> None:
    async with tab(browser, page, viewport={"width": width, "height": 800}) as opened:
        for view in (
            "list",
            "plots",
            "run",
            f"t/{records[5]['id']}",
            f"t/{records[5]['id']}/tokens",
            f"t/{records[5]['id']}/record",
        ):
            await opened.page.evaluate(f"location.hash = '#/{view}'")
            await opened.page.wait_for_timeout(150)
            parts = (
                "[document.documentElement, ...document.querySelectorAll('main, main > section')]"
            )
            wide = (
                f"{parts}.filter(part => part.scrollWidth > part.clientWidth + 1)"
                ".map(part => part.id || part.tagName)"
            )
            assert await opened.page.evaluate(wide) == []


async def test_everything_has_a_name_for_those_who_do_not_see_it(
    browser: Any, page: Path, records: list[Record]
) -> None:
    async with tab(browser, page, f"#/t/{records[5]['id']}") as opened:
        await opened.until("document.querySelector('#detail .message')")
        nameless = """[...document.querySelectorAll(
            'button, a, input, [role=grid], [role=img], progress, dialog, nav')]
          .filter(e => e.checkVisibility())
          .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))
          .map(e => e.outerHTML)"""
        assert await opened.page.evaluate(nameless) == []
        assert await opened.page.get_attribute("#grid", "aria-rowcount") == str(N + 1)
        assert await opened.page.locator("#space [role=row][aria-rowindex]").count() > 5
        active = await opened.page.get_attribute("#grid", "aria-activedescendant")
        assert await opened.page.get_attribute(f"#{active}", "aria-selected") == "true"


async def test_a_conversation_prints_whole(browser: Any, page: Path, records: list[Record]) -> None:
    long = max(records, key=lambda record: record["num_turns"])
    async with tab(browser, page, f"#/t/{long['id']}") as opened:
        await opened.until("document.querySelector('#detail .message')")
        await opened.page.emulate_media(media="print")
        hidden = await opened.page.evaluate(
            "['.top', '#list', '.tabs'].map(name => document.querySelector(name).checkVisibility())"
        )
        assert hidden == [False, False, False]
        assert await opened.page.evaluate(
            "(detail => detail.scrollHeight === detail.clientHeight)"
            "(document.getElementById('detail'))"
        )
        assert len(await opened.page.pdf()) > 10_000


# ---------------------------------------------------------------------- scored again


async def test_a_strip_shows_how_far_each_token_is_from_an_engine_that_scored_it_again(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    scored = changed_run(tmp_path / "run", run, lambda number, record: None)
    record = next(one for one in open_run(scored).records() if one["num_turns"] > 1)
    found = [0.0 if mask else None for mask in record["response_mask"]]
    worst = [place for place, value in enumerate(found) if value is not None][3]
    found[worst] = -2.5
    write_scores(scored, {}, [score_line(record["id"], record["sha256"], found)])
    place = f"#/t/{record['id']}/tokens"
    async with tab(browser, write_page(scored, tmp_path / "page.html", limit=20), place) as opened:
        await opened.until("document.querySelector('#detail .score-strip')")
        levels = await opened.page.evaluate(
            "[...document.querySelectorAll('.score-strip > [data-level]')]"
            ".map(e => e.dataset.level)"
        )
        assert (levels.count("4"), set(levels)) == (1, {"0", "4"})
        await opened.page.locator(".score-strip [data-level='4']").click()
        assert "−2.500000" in await opened.text("#tip")
        active = "[...document.querySelectorAll('.token')].findIndex(e => e.matches('.active'))"
        assert await opened.page.evaluate(active) == len(record["prompt_ids"]) + worst


async def test_without_scores_of_this_record_there_is_no_strip(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    scored = changed_run(tmp_path / "run", run, lambda number, record: None)
    record = next(open_run(scored).records())
    found: list[float | None] = [0.5] * len(record["response_ids"])
    write_scores(scored, {}, [score_line(record["id"], "of another record", found)])
    place = f"#/t/{record['id']}/tokens"
    async with tab(browser, write_page(scored, tmp_path / "page.html", limit=20), place) as opened:
        await opened.until("document.querySelector('#detail .token')")
        assert await opened.page.evaluate("document.querySelector('.score-strip')") is None
