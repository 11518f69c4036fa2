"""`turntrace show`: one trajectory in the terminal, whatever its texts hold."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.terminal import one_line, visible
from conversations.run.open_run import open_run
from tests.command import turntrace
from tests.conversations.pages import Record, changed_run
from tests.conversations.synthetic import make_run
from tests.helpers import child_env

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eesrever\x00 [bold red]markup[/] half \ud83d"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("show") / "run", 24)


@pytest.fixture(scope="module")
def record(run: Path) -> Record:
    """One with several turns, calls that worked and calls that did not."""
    return next(
        one
        for one in open_run(run).records()
        if len({call["status"] for call in one["tool_calls"]}) > 1
    )


def test_messages_calls_and_authors_are_shown(run: Path, record: Record) -> None:
    ran = turntrace("show", str(run), record["id"], "--full", cwd=run)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    lines = ran.stdout.splitlines()
    assert lines[0] == record["id"]
    assert f"stop reason   {record['stop_reason']}" in lines
    for message in record["messages"]:
        for line in str(message["content"]).splitlines() if message["role"] != "tool" else ():
            assert line in lines
    for call in record["tool_calls"]:
        assert any(line.startswith(f"  {call['name']} {call['status']}  ") for line in lines)
        assert all(f"  > {line}" in lines for line in (call["response"] or "").splitlines() if line)
    for kind in {kind for kind, _, _ in record["segments"]}:
        total = sum(end - start for name, start, end in record["segments"] if name == kind)
        assert any(re.fullmatch(rf"{kind} +{total} +[\d.]+%", line) for line in lines)


def test_tokens_are_shown_by_author_and_put_together_to_the_text(run: Path, record: Record) -> None:
    plain = turntrace("show", str(run), record["id"], cwd=run).stdout
    shown = turntrace("show", str(run), record["id"], "--tokens", cwd=run).stdout.removeprefix(
        plain
    )
    parts = re.split(r"^\n?(\w+)  (\d+) to (\d+), \d+ tokens\n", shown, flags=re.MULTILINE)[1:]
    assert [
        [kind, int(start), int(end)]
        for kind, start, end in zip(parts[::4], parts[1::4], parts[2::4], strict=True)
    ] == record["segments"]
    decoded = (
        open_run(run)
        .tokenizer()
        .decode(record["prompt_ids"] + record["response_ids"], clean_up_tokenization_spaces=False)
    )
    assert "".join(text.rstrip("\n").removesuffix("\n") for text in parts[3::4]).replace(
        "↵", ""
    ).replace("\n", "") == visible(decoded).replace("\n", "")


def test_where_a_turn_was_gone_on_with_is_shown(run: Path, tmp_path: Path) -> None:
    def resumed(number: int, record: Record) -> None:
        record["turns"][0]["resumed"] = [[700, "step-3"], [710, None]]

    other = changed_run(tmp_path / "run", run, resumed)
    shown = turntrace("show", "run", next(iter(open_run(other).ids)), cwd=tmp_path).stdout
    assert ", resumed at token 700 (weights step-3), resumed at token 710\n" in shown


def test_a_record_that_was_changed_is_named(run: Path, record: Record, tmp_path: Path) -> None:
    says = (
        "does not match its hash: it was changed after it was written; turntrace verify says more\n"
    )
    assert says not in turntrace("show", str(run), record["id"], cwd=run).stdout
    other = changed_run(tmp_path / "run", run, lambda number, record: None)
    file = other / "trajectories.jsonl"
    file.write_text(
        re.sub(r'"wall_s":[^,]+', '"wall_s":77.5', file.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
    assert says in turntrace("show", "run", record["id"], cwd=tmp_path).stdout


def test_long_texts_are_cut_until_asked_for(run: Path, tmp_path: Path) -> None:
    def long(number: int, record: Record) -> None:
        record["messages"][0]["content"] = "x" * 5000

    other = changed_run(tmp_path / "run", run, long)
    name = next(iter(open_run(other).ids))
    cut = turntrace("show", "run", name, cwd=tmp_path).stdout
    assert "x" * 2000 + "\n... 3000 more characters; --full shows them\n" in cut
    assert "x" * 5000 in turntrace("show", "run", name, "--full", cwd=tmp_path).stdout


def test_nothing_of_a_record_reaches_the_terminal_as_a_control(run: Path, tmp_path: Path) -> None:
    def evil(number: int, record: Record) -> None:
        for message in record["messages"]:
            message["content"] = EVIL
        for call in record["tool_calls"]:
            call |= {
                "name": EVIL,
                "response": EVIL,
                "error": EVIL,
                "arguments": {EVIL: EVIL},
                "status": EVIL,
            }
        record |= {
            "error": EVIL,
            "warnings": [{"kind": EVIL, "text": EVIL}],
            "stop_reason": EVIL,
            "ground_truth": EVIL,
            "parent": {EVIL: EVIL},
        }
        record["turns"] = [{**turn, "finish_reason": EVIL} for turn in record["turns"]]
        record["segments"] = [[EVIL, start, end] for _, start, end in record["segments"]]
        task = f"{EVIL[:-1]}{number}".replace("\0", "")  # what a command line can name
        record |= {"task_id": task, "sample": 0, "id": f"{task}-0"}

    other = changed_run(tmp_path / "run", run, evil)
    for name in list(open_run(other).ids)[:6]:
        screen = _on_a_terminal("show", "run", name, "--tokens", cwd=tmp_path)
        assert b"tokens" in screen
        without_styles = re.sub(rb"\x1b\[[0-9;]*m", b"", screen)
        assert not re.search(
            rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]", without_styles
        )


def test_markup_of_the_printer_is_text(run: Path, tmp_path: Path) -> None:
    other = changed_run(
        tmp_path / "run",
        run,
        lambda number, record: record["messages"].__setitem__(0, {"role": "user", "content": EVIL}),
    )
    shown = turntrace("show", "run", next(iter(open_run(other).ids)), cwd=tmp_path).stdout
    assert "␛[2J␛]0;owned␇⟨U+009B⟩31m␍⟨U+202E⟩esrever␀ [bold red]markup[/] half ⟨U+D83D⟩" in shown


def _on_a_terminal(*arguments: str, cwd: Path) -> bytes:
    """What a command writes when its output is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "agent", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, stdout=theirs, stderr=theirs, env=child_env({"TERM": "xterm-256color"})
    )
    os.close(theirs)
    read = b""
    with os.fdopen(ours, "rb", closefd=True) as screen:
        try:
            while piece := screen.read1(1 << 16):
                read += piece
        except OSError:  # how a terminal says that nobody writes any more
            pass
    process.wait(timeout=60)
    return read


def test_a_terminal_gets_colours(run: Path, record: Record) -> None:
    assert b"\x1b[" in _on_a_terminal("show", str(run), record["id"], cwd=run)


def test_an_id_that_is_not_there_names_those_like_it(run: Path) -> None:
    ran = turntrace("show", str(run), "apples-000001", cwd=run)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "there is apples-000001-" in ran.stderr
    assert turntrace("show", str(run / "none"), "x", cwd=run).returncode == 2


def test_thinking_is_folded_and_warnings_have_their_kind(run: Path, tmp_path: Path) -> None:
    def thinks(number: int, record: Record) -> None:
        record["warnings"] = [{"kind": "other", "text": "look"}]
        for message in record["messages"]:
            message["reasoning_content"] = "six \x1b sevens"

    other = changed_run(tmp_path / "run", run, thinks)
    name = next(iter(open_run(other).ids))
    folded, whole = (
        turntrace("show", "run", name, *options, cwd=tmp_path).stdout
        for options in ([], ["--full"])
    )
    assert "other: look" in folded
    assert "thinking: 12 characters" in folded
    assert "sevens" not in folded
    assert "~ six \u241b sevens" in whole


def test_a_damaged_record_is_one_line(run: Path, tmp_path: Path) -> None:
    other = changed_run(
        tmp_path / "run",
        run,
        lambda number, record: record.update({"turns": [7], "messages": "none", "segments": [1]}),
    )
    ran = turntrace("show", "run", next(iter(open_run(other).ids)), cwd=tmp_path)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "is damaged" in ran.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n", "a\tb\n"),
        ("\x00\x1b\x7f", "␀␛␡"),
        ("\x85\u2028", "⟨U+0085⟩⟨U+2028⟩"),
        ("\u202e\ufeff\udc00", "⟨U+202E⟩⟨U+FEFF⟩⟨U+DC00⟩"),
        ("é漢🙂", "é漢🙂"),
    ],
)
def test_visible_leaves_text_and_shows_what_acts(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert one_line(text) == shown.replace("\n", "␊").replace("\t", "␉")
