"""The page's data, without a browser: nothing lost, nothing in the clear, and memory that does
not grow."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conversations.errors import RecordError, RunFolderError
from conversations.page import build, html, parent_of
from conversations.page import record as page_record
from conversations.page.build import divergence
from conversations.page.pieces import pieces
from conversations.run.open_run import TOKENIZER, Run, open_run
from conversations.run.store import RUN, TRAJECTORIES
from tests.conversations.pages import (
    Record,
    changed_run,
    parts_of,
    records_of,
    write_page,
    write_run,
)
from tests.conversations.synthetic import make_run
from tests.helpers import ODD_TEXTS, float32, npm_models, odd_text, tokenizer_at

N = 48


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", N)


def test_a_page_holds_every_record_to_the_last_bit(run: Path, tmp_path: Path) -> None:
    page = write_page(run, tmp_path / "page.html")
    assert records_of(page.read_text(encoding="utf-8")) == list(open_run(run).records())


def test_log_probs_that_are_no_float32_and_odd_texts_come_through_as_well(
    run: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)

    def odd(number: int, record: Record) -> None:
        record["response_logprobs"] = [
            value and (value / 3 if number % 2 else float32(rng))
            for value in record["response_logprobs"]
        ]
        record["messages"][0]["content"] = odd_text(rng) + "half \ud83d of a pair \udc00" * (
            number % 3
        )

    other = changed_run(tmp_path / "odd", run, odd)
    page = write_page(other, tmp_path / "page.html")
    assert records_of(page.read_text(encoding="utf-8")) == list(open_run(other).records())


def test_nothing_of_a_record_stands_in_the_page_in_the_clear(run: Path, tmp_path: Path) -> None:
    def marked(number: int, record: Record) -> None:
        task = f"zanzibar</script><script>{number}"
        record |= {
            "task_id": task,
            "sample": 0,
            "id": f"{task}-0",
            "stop_reason": "zanzibar",
            "error": "zanzibar",
            "extra": {"zanzibar": "zanzibar"},
        }
        record["messages"] = [{"role": "user", "content": "<img src=zanzibar onerror=alert(1)>"}]

    page = write_page(
        changed_run(tmp_path / "marked", run, marked), tmp_path / "page.html"
    ).read_text(encoding="utf-8")
    assert "zanzibar" not in page
    assert records_of(page)[3]["messages"][0]["content"] == "<img src=zanzibar onerror=alert(1)>"


def test_a_run_folders_own_name_is_escaped(run: Path, tmp_path: Path) -> None:
    named = changed_run(tmp_path / "<b>&'\"x", run, lambda number, record: None)
    page = write_page(named, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>&'" not in page
    assert "<title>&lt;b&gt;&amp;&#39;&#34;x · turntrace</title>" in page


def test_the_policy_lets_run_the_one_script_and_reach_nothing(run: Path, tmp_path: Path) -> None:
    page = write_page(run, tmp_path / "page.html").read_text(encoding="utf-8")
    (running,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert running == html.script()
    rules = html.policy(served=False).replace("'", "&#39;")
    assert f'http-equiv="Content-Security-Policy" content="{rules}"' in page
    assert "connect-src 'none'" in html.policy(served=False)
    assert "unsafe" not in html.policy(served=True)
    assert not re.search(
        r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page.split('<script type="text/plain"')[0]
    )


def test_the_script_has_no_way_from_text_to_markup_or_code() -> None:
    ways = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "createContextualFragment",
    )
    assert [way for way in ways if way in html.script()] == []


def test_a_limit_is_kept_and_told(run: Path, tmp_path: Path) -> None:
    summary, _, _ = parts_of(
        write_page(run, tmp_path / "page.html", limit=5).read_text(encoding="utf-8")
    )
    assert (len(summary["columns"]["id"]), summary["run"]["total"]) == (5, N)


def test_a_page_may_be_bounded_in_bytes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversations.page.blocks.BLOCK_CHARACTERS", 1)
    with build(open_run(run), max_bytes=20_000) as page:
        assert page.blocks.size >= 20_000
        assert page.shown < page.total == N


def test_an_empty_run_has_a_page(run: Path, tmp_path: Path) -> None:
    summary, known, blocks = parts_of(
        write_page(write_run(tmp_path / "empty", run, []), tmp_path / "p.html").read_text(
            encoding="utf-8"
        )
    )
    assert (summary["columns"], known["ids"], blocks) == ({}, [], [])


def test_texts_of_a_huge_record_are_cut_and_say_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_record, "RECORD_LIMIT", 1 << 14)
    monkeypatch.setattr(page_record, "TEXT_LIMIT", 1 << 10)

    def huge(number: int, record: Record) -> None:
        record["messages"][0]["content"] = "x" * (1 << 15 if number else 10)

    first, second, *_ = records_of(
        write_page(changed_run(tmp_path / "huge", run, huge), tmp_path / "page.html").read_text(
            encoding="utf-8"
        )
    )
    assert first["messages"][0]["content"] == "x" * 10
    assert (
        second["messages"][0]["content"]
        == "x" * 1024 + "\n[cut in this page: 1024 of 32768 characters]"
    )


def test_memory_does_not_grow_with_the_conversations(run: Path, tmp_path: Path) -> None:
    """The summary grows with their number, a kilobyte each; what they say does not stay."""

    def longer(number: int, record: Record) -> None:
        record["messages"][0]["content"] = random.Random(number).randbytes(100_000).hex()

    long = open_run(changed_run(tmp_path / "long", run, longer))
    _peak(long, 1)  # reads the tokenizer, which takes more than all else and is kept
    few, many = _peak(long, 16), _peak(long, N)
    assert many[1] - few[1] > 5_000_000
    assert many[0] - few[0] < 5_000_000  # what they say is 6.4 MB


def _peak(run: Run, limit: int) -> tuple[int, int]:
    """Bytes that Python held at most while a page was built, and bytes of its blocks."""
    tracemalloc.start()
    try:
        with build(run, limit=limit) as page:
            return tracemalloc.get_traced_memory()[1], page.blocks.size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "forged",
    [
        {"messages": "none"}, {"messages": [1]}, {"tool_calls": [{}]}, {"tool_calls": [7]},
        {"prompt_ids": "text"}, {"response_ids": None},
        {"response_mask": 5}, {"num_turns": "3"}, {"sample": [0]}, {"reward": 10**400}, {"wall_s":
        [1]}, {"warnings": 3},
    ],
)  # fmt: skip
def test_a_forged_record_is_named(run: Path, tmp_path: Path, forged: Record) -> None:
    def change(number: int, record: Record) -> None:
        if number == 7:
            record |= forged

    name = list(open_run(run).ids)[7]
    with pytest.raises(RecordError, match=f"trajectory {name} is damaged: "):
        write_page(changed_run(tmp_path / "forged", run, change), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_line_is_named(run: Path, tmp_path: Path) -> None:
    damaged = changed_run(tmp_path / "damaged", run, lambda number, record: None)
    lines = (damaged / TRAJECTORIES).read_text(encoding="utf-8").splitlines(keepends=True)
    (damaged / TRAJECTORIES).write_text("".join([*lines[:3], "{}\n"]), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"trajectories.jsonl:4"):
        write_page(damaged, tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_page(run, tmp_path / "no" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_page(run, tmp_path / "folder.html")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


# ---------------------------------------------------------------------- token texts


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5"])
def test_the_pieces_of_an_encoding_are_its_text_byte_by_byte(name: str, run: Path) -> None:
    file = (
        run / TOKENIZER / "tokenizer.json"
        if name == "smollm2"
        else npm_models(name) / "tokenizer.json"
    )
    tokenizer = tokenizer_at(file.parent)
    encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in ODD_TEXTS}
    found = pieces(file, {token for ids in encoded.values() for token in ids})
    as_bytes = [
        piece.encode() if isinstance(piece, str) else bytes(piece) for piece in found["pieces"]
    ]
    table = dict(zip(found["ids"], as_bytes, strict=True))
    for ids in encoded.values():
        assert b"".join(table[token] for token in ids).decode() == tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        )


def test_ids_without_a_token_have_no_piece(run: Path) -> None:
    found = pieces(run / TOKENIZER / "tokenizer.json", {1, -1, 10**9, 2**70})
    assert (found["ids"], found["special"]) == ([1], [1])


def test_byte_fallback_and_word_marks_are_read(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0xF0>": 1, "\u2581the": 2}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
    (tmp_path / "t.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "decoder": decoder}), encoding="utf-8"
    )
    assert pieces(tmp_path / "t.json", {0, 1, 2})["pieces"] == ["<unk>", [0xF0], " the"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"added_tokens": [{}]}', "[" * 100_000]
)
def test_a_broken_tokenizer_leaves_the_ids(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    assert pieces(tmp_path / "t.json", {1})["ids"] == []
    assert pieces(tmp_path / "none.json", {1})["ids"] == []


# ---------------------------------------------------------------------- two runs


def test_the_first_difference_is_found_by_token_and_turn(run: Path) -> None:
    record = next(one for one in open_run(run).records() if len(one["turns"]) > 2)
    assert divergence(record, record) is None
    start = record["turns"][1]["start"]
    for position, turn in ((0, None), (start - 1, 0), (start, 1), (start + 1, 1)):
        other = json.loads(json.dumps(record))
        ids, place = (
            (other["prompt_ids"], position)
            if position < len(other["prompt_ids"])
            else (other["response_ids"], position - len(other["prompt_ids"]))
        )
        ids[place] += 1
        assert divergence(record, other) == {"token": position, "turn": turn}
    shorter = {**record, "response_ids": record["response_ids"][:-2]}
    assert divergence(record, shorter) == {
        "token": len(record["prompt_ids"] + record["response_ids"]) - 2,
        "turn": len(record["turns"]) - 1,
    }


def test_counterparts_are_found_by_parent_or_id(run: Path, tmp_path: Path) -> None:
    def replayed(number: int, record: Record) -> None:
        parent = record["id"]
        if number % 3 == 0:
            record |= {
                "task_id": f"replay-{number}",
                "sample": 0,
                "id": f"replay-{number}-0",
                "parent": {"run": "run", "id": parent, "turn": None},
            }
        if number % 3 == 2:
            record |= {"task_id": f"alone-{number}", "sample": 0, "id": f"alone-{number}-0"}

    page = write_page(
        changed_run(tmp_path / "replay", run, replayed), tmp_path / "page.html", against=run
    ).read_text(encoding="utf-8")
    summary, _, blocks = parts_of(page)
    columns = summary["columns"]
    ids = list(open_run(run).ids)
    assert columns["other"] == [None if number % 3 == 2 else ids[number] for number in range(N)]
    assert columns["differs"] == [None] * N
    others = [
        json.loads(blocks[columns["block"][row]][columns["line"][row] + 2])["id"]
        for row in range(N)
        if row % 3 != 2
    ]
    assert others == [name for name in columns["other"] if name]


def test_a_parent_is_known_by_its_hash_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    child = changed_run(tmp_path / "child", run, lambda number, record: None)

    def name(parent: Any) -> Path | None:
        manifest = {**json.loads((child / RUN).read_text(encoding="utf-8")), "parent": parent}
        (child / RUN).write_text(json.dumps(manifest), encoding="utf-8")
        found = parent_of(open_run(child))
        return None if found is None else found.path

    digest = hashlib.sha256((run / RUN).read_bytes()).hexdigest()
    assert name({"run": "run", "path": str(run), "run_sha256": digest}) == run
    assert name({"run": "moved", "path": "/not/there", "run_sha256": digest}) is None
    moved = changed_run(tmp_path / "moved", run, lambda number, record: None)
    assert name({"run": "moved", "path": "/not/there", "run_sha256": digest}) == moved
    for other in (
        {"path": str(run), "run_sha256": "0" * 64},
        {"path": str(run)},
        {"path": "\0", "run_sha256": ""},
        "run",
        None,
        3,
    ):
        assert name(other) is None
