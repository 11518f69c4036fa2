"""`turntrace index` and `turntrace serve search`: output, files, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.command import turntrace
from tests.helpers import ROOT
from tools.servers.search.corpus import JsonlCorpus
from tools.servers.search.index import build_index

CORPUS = (
    '{"id": "1", "contents": "\\"Cats\\"\\nCats chase mice."}\n'
    '{"id": "2", "title": "Dogs", "text": "Dogs chase cats."}\n'
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "corpus.jsonl").write_text(CORPUS, encoding="utf-8")
    return tmp_path


@contextmanager
def start(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "agent", *arguments]
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    done = turntrace(*arguments, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_index_says_what_it_made_and_makes_it_once(folder: Path) -> None:
    code, out, err = run("index", "corpus.jsonl", cwd=folder)
    assert (code, err) == (0, "")
    made = re.fullmatch(r"2 documents indexed in [\d.]+ s: (.+) \([\d.]+ MiB\)\n", out)
    assert made is not None
    assert Path(made[1]).parent == folder / "cache" / "search"
    again = run("index", "corpus.jsonl", cwd=folder)
    assert again == (0, f"nothing to do: {made[1]} holds the 2 documents of corpus.jsonl\n", "")


def test_an_index_elsewhere_is_served_without_its_corpus(folder: Path) -> None:
    assert run("index", "corpus.jsonl", "--out", "kept", cwd=folder)[0] == 0
    (folder / "corpus.jsonl").unlink()
    with start("serve", "search", "--index", "kept", "--port", "0", cwd=folder) as server:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        assert (said["corpus"], said["documents"]) == ("corpus.jsonl", 2)
        url = f"http://127.0.0.1:{said['port']}"
        found = httpx.post(
            f"{url}/retrieve", json={"queries": ["mice", "dog"], "topk": 1, "return_scores": True}
        ).json()
        assert [[hit["document"]["id"] for hit in hits] for hits in found["result"]] == [
            ["1"],
            ["2"],
        ]
        taken = run("serve", "search", "--index", "kept", "--port", str(said["port"]), cwd=folder)
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30) == ("", "")
    assert server.returncode == 0
    assert (taken[0], taken[1], taken[2].count("\n")) == (2, "", 1)
    assert taken[2].startswith(f"error: cannot listen on 127.0.0.1:{said['port']}: ")


def test_ctrl_c_leaves_nothing_half_made(folder: Path) -> None:
    big = folder / "big.jsonl"
    big.write_text(
        "".join(f'{{"id": {n}, "contents": "Title {n}\\ntext {n}"}}\n' for n in range(400_000)),
        encoding="utf-8",
    )
    with start("index", "big.jsonl", "--out", "made", cwd=folder) as process:
        while not any(folder.glob(".made*/*")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert sorted(os.listdir(folder)) == ["big.jsonl", "cache", "corpus.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["index", "none.jsonl"], "error: none.jsonl: cannot be read: No such file or directory"),
        (["index", "bad.jsonl"], "error: bad.jsonl:1: contents must be a string, got nothing"),
        (
            ["index", "corpus.jsonl", "--out", "."],
            "error: . is the working folder, which an index would replace; choose another place",
        ),
        (
            ["index", "corpus.jsonl", "--out", "corpus.jsonl"],
            "error: corpus.jsonl is there and is not a search index; choose another place",
        ),
        (
            ["serve", "search", "--index", "made", "--host", "256.0.0.1"],
            "error: cannot listen on 256.0.0.1:8000: ",
        ),
        (
            ["serve", "search", "--index", "corpus.jsonl"],
            "error: corpus.jsonl is not a search index; make one with",
        ),
        (
            ["serve", "search", "--corpus", "bad.jsonl"],
            "error: bad.jsonl:1: contents must be a string, got nothing",
        ),
        (
            ["serve", "search", "--corpus", "corpus.jsonl", "--index", "x"],
            "error: --corpus and --index both say what to search",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    folder: Path, arguments: list[str], says: str
) -> None:
    (folder / "bad.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    build_index(JsonlCorpus(folder / "corpus.jsonl"), folder / "made")
    code, out, err = run(*arguments, cwd=folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(says)
