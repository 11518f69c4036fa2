"""The server client against real HTTP servers: one that does as it is told, and SGLang's own."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from agent.engines import server as one_server
from agent.engines import servers, sglang
from agent.engines.engine import Generation, Interrupted
from agent.engines.servers import SGLangServerEngine
from agent.errors import ConfigError, EngineError, EngineStartError
from agent.model.base import base_model_dir
from tests.agent.engines.conftest import OwnServer
from tests.agent.native_api import (
    Server,
    answers,
    breaks,
    free_port,
    serving,
    status,
    waits,
)
from tests.helpers import tokenizer_at


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_BACKOFF_S", 0.01)


@contextlib.asynccontextmanager
async def engine_of(server: Server, **options: Any) -> AsyncIterator[SGLangServerEngine]:
    engine = SGLangServerEngine([server.url], options.pop("api_key", None), **options)
    try:
        yield engine
    finally:
        await engine.close()


async def sample(
    engine: SGLangServerEngine, ids: list[int], request_id: str | None = None, **sampling: Any
) -> Generation:
    return await engine.generate(
        ids,
        {"temperature": 0.0, "max_new_tokens": 16, **sampling},
        request_id=request_id or uuid.uuid4().hex,
    )


# ---------------------------------------------------------------------- what is sent, what comes
# back


async def test_the_native_request_and_its_answer() -> None:
    async with serving(Server(answers)) as server, engine_of(server, api_key="k") as engine:
        request_id = uuid.uuid4().hex
        generation = await sample(engine, [1, 2, 3], request_id, stop_token_ids=[2])
        assert generation == Generation(
            [5, 2], [-0.25, -1.5], "stop", prompt_tokens=3, cached_tokens=0
        )
        assert server.bodies == [
            {
                "rid": request_id,
                "input_ids": [1, 2, 3],
                "sampling_params": {
                    "temperature": 0.0,
                    "max_new_tokens": 16,
                    "stop_token_ids": [2],
                },
                "return_logprob": True,
                "stream": False,
            }
        ]
        assert server.headers[0]["authorization"] == "Bearer k"


async def test_the_callers_list_is_its_own_again_once_the_call_runs() -> None:
    ids = [1, 2, 3]
    async with serving(Server(status(503, "busy"), answers)) as server, engine_of(server) as engine:
        running = asyncio.create_task(sample(engine, ids))
        await asyncio.sleep(0)
        ids.append(4)
        await running
        assert [body["input_ids"] for body in server.bodies] == [[1, 2, 3], [1, 2, 3]]


async def test_describe_tells_what_the_server_serves_and_no_secret() -> None:
    async with serving(Server(answers)) as server, engine_of(server, api_key="k") as engine:
        await engine.connect()
        assert engine.describe() == {
            "name": "sglang_server",
            "url": server.url,
            "model_path": "/models/m",
            "version": "9.9",
            "dtype": "auto",
        }
        assert server.bodies == []  # /generate is for conversations only


async def test_no_message_and_no_record_shows_the_password_of_an_address() -> None:
    async with serving(Server(status(500, "oops"))) as server:
        engine = SGLangServerEngine([server.url.replace("://", "://me:s3cret@")], attempts=1)
        assert engine.describe()["url"] == server.url
        with pytest.raises(EngineError, match=server.url):
            await sample(engine, [1])
        server.up = False
        with pytest.raises(EngineStartError) as raised:
            await engine.connect()
        assert "s3cret" not in str(raised.value)
        await engine.close()


# ---------------------------------------------------------------------- retries


async def test_a_server_error_is_tried_again_under_a_fresh_request_id() -> None:
    async with (
        serving(Server(status(500, "oops"), status(503, "queue full"), answers)) as server,
        engine_of(server) as engine,
    ):
        assert (await sample(engine, [1])).token_ids == [5, 2]
        rids = [body["rid"] for body in server.bodies]
        assert len(set(rids)) == 3
        assert {len(rid) for rid in rids} == {32}


async def test_retries_have_an_end() -> None:
    async with (
        serving(Server(status(504, "too late"))) as server,
        engine_of(server, attempts=3) as engine,
    ):
        with pytest.raises(EngineError, match=r"3 times.* 504: too late"):
            await sample(engine, [1])
        assert len(server.bodies) == 3


@pytest.mark.parametrize("code", [408, 429, 502, 503])
async def test_a_full_queue_is_waited_for_and_is_no_failure(code: int) -> None:
    """A router's limit on requests, SGLang's on its queue, a proxy whose server starts again."""
    busy = [status(code, "queue full")] * 4
    async with serving(Server(*busy, answers)) as server, engine_of(server, attempts=2) as engine:
        assert (await sample(engine, [1])).token_ids == [5, 2]
        assert len(server.bodies) == 5


async def test_a_full_queue_is_not_waited_for_without_end() -> None:
    async with (
        serving(Server(status(429, "queue full"))) as server,
        engine_of(server, wait_s=0.1) as engine,
    ):
        with pytest.raises(EngineError, match=r"0\.1 s.* 429: queue full"):
            await sample(engine, [1])


@pytest.mark.parametrize(
    ("given", "least_s", "most_s"),
    [
        ("7", 7, 8),
        ("0", 0, 1),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 1),
        ("soon", 0, 1),
        (None, 0, 1),
    ],
)
def test_no_sooner_than_the_server_says(given: str | None, least_s: float, most_s: float) -> None:
    response = httpx.Response(429, headers={"Retry-After": given} if given else {})
    busy = one_server.ServerBusyError("full", one_server.retry_after_s(response))
    assert least_s <= servers.RetryBudget(8, 300.0).after_busy_s("http://h", busy) <= most_s


async def test_a_refused_connection_is_waited_for() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    engine = SGLangServerEngine([url], wait_s=0.1)
    with pytest.raises(EngineError, match=r"0\.1 s: http://127\.0\.0\.1:\d+: "):
        await sample(engine, [1])
    with pytest.raises(
        EngineStartError,
        match=r"http://127\.0\.0\.1:\d+: .*rollout\.server\.urls",
    ):
        await engine.connect()
    await engine.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"error": {"message": "The input is longer\nthan the context"}},
            "status 400: The input is longer than the context",
        ),
        ({"detail": "no such thing"}, "status 400: no such thing"),
        ("plain words", "status 400: plain words"),
    ],
)
async def test_a_refusal_is_final_and_in_the_servers_words(body: Any, message: str) -> None:
    async with serving(Server(status(400, body))) as server, engine_of(server) as engine:
        with pytest.raises(EngineError, match=message):
            await sample(engine, [1])
        assert len(server.bodies) == 1


async def test_a_connection_that_breaks_is_aborted_and_the_turn_sent_again() -> None:
    """The server may still be generating; what it samples there, nobody has seen."""
    async with serving(Server(breaks, answers)) as server, engine_of(server) as engine:
        assert (await sample(engine, [1, 2])).token_ids == [5, 2]
        first, second = server.bodies
        assert first["input_ids"] == second["input_ids"] == [1, 2]
        assert server.aborted == [first["rid"]] != [second["rid"]]


async def test_a_turn_that_takes_too_long_is_aborted_and_not_sent_again() -> None:
    async with serving(Server(waits)) as server, engine_of(server, read_timeout_s=0.2) as engine:
        with pytest.raises(EngineError, match="timeout"):
            await sample(engine, [1])
        assert server.aborted == [body["rid"] for body in server.bodies]
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "[1]",
        '{"output_ids": [5]}',
        '{"output_ids": [5], "meta_info": {"finish_reason": {"type": "stop"}}}',
    ],
)
async def test_an_answer_that_is_none_is_an_engine_error(body: str) -> None:
    async with serving(Server(status(200, body))) as server, engine_of(server) as engine:
        with pytest.raises(EngineError, match=r"^[^\n]+$"):
            await sample(engine, [1])


@pytest.mark.parametrize("told", ["soon", float("nan"), [1], True, None])
def test_a_figure_that_is_none_does_not_cost_the_turn(told: Any) -> None:
    meta = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.5, 5, None]],
        "weight_version": 3,
    }
    answer = {
        "output_ids": [5],
        "meta_info": {**meta, "cached_tokens": told, "queue_time": told, "e2e_latency": told},
    }
    assert sglang.read_answer(answer) == Generation([5], [-0.5], "stop", weight_version="3")


# ---------------------------------------------------------------------- stopping


async def test_cancelling_aborts_on_the_server() -> None:
    async with serving(Server(waits)) as server, engine_of(server) as engine:
        request_id = uuid.uuid4().hex
        running = asyncio.create_task(sample(engine, [1], request_id))
        await server.got_one.wait()
        running.cancel()
        with pytest.raises(Interrupted) as raised:
            await running
        assert raised.value.generation == Generation([5], [-0.25], "abort")
        await engine.close()
        assert server.aborted == [request_id]


async def test_an_abort_that_was_cancelled_is_sent_when_the_engine_is_closed() -> None:
    """As at the end of a run, which cancels whatever still runs."""
    async with serving(Server(answers)) as server, engine_of(server) as engine:
        for rid in ("a" * 32, "b" * 32):
            engine._abort_in_background(engine._servers[0], rid)
        for task in engine._aborts:
            task.cancel()
        await asyncio.sleep(0)
        await engine.close()
        assert sorted(server.aborted) == ["a" * 32, "b" * 32]


async def test_a_server_that_does_not_say_what_it_sampled_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang, "ABORT_S", 0.1)
    async with serving(Server(hangs)) as server, engine_of(server) as engine:
        running = asyncio.create_task(sample(engine, [1]))
        await server.got_one.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await running
        assert not isinstance(raised.value, Interrupted)


async def hangs(server: Server, body: dict[str, Any]) -> Response:
    """Hears no abort."""
    await server.release.wait()
    return Response(status_code=500)


async def test_abort_returns_what_there_is_and_names_the_retried_request() -> None:
    async with serving(Server(status(500, "oops"), waits)) as server, engine_of(server) as engine:
        request_id = uuid.uuid4().hex
        running = asyncio.create_task(sample(engine, [1], request_id))
        while len(server.bodies) < 2:  # noqa: ASYNC110 - the second of two requests
            await asyncio.sleep(0.01)
        await engine.abort("nobody")
        await engine.abort(request_id)
        assert (await running).finish_reason == "abort"
        assert server.aborted == [body["rid"] for body in server.bodies]


async def test_aborts_do_not_queue_behind_generations() -> None:
    async with serving(Server(waits)) as server, engine_of(server, max_connections=1) as engine:
        first, second = uuid.uuid4().hex, uuid.uuid4().hex
        tasks = [
            asyncio.create_task(sample(engine, [1], request_id)) for request_id in (first, second)
        ]
        await server.got_one.wait()
        async with asyncio.timeout(20):
            await engine.abort(first)
            while len(server.bodies) < 2:  # noqa: ASYNC110 - the second gets the connection of the first
                await asyncio.sleep(0.01)
            await engine.abort(second)
            assert {generation.finish_reason for generation in await asyncio.gather(*tasks)} == {
                "abort"
            }


async def test_as_many_turns_run_at_once_as_there_are_connections() -> None:
    count = 9
    async with serving(Server(waits)) as server, engine_of(server, max_connections=count) as engine:
        ids = [uuid.uuid4().hex for _ in range(count)]
        tasks = [asyncio.create_task(sample(engine, [1], request_id)) for request_id in ids]
        async with asyncio.timeout(20):
            while len(server.bodies) < count:  # noqa: ASYNC110 - they come in one by one
                await asyncio.sleep(0.01)
            await asyncio.gather(*map(engine.abort, ids))
            assert {generation.finish_reason for generation in await asyncio.gather(*tasks)} == {
                "abort"
            }


async def test_a_request_id_in_flight_is_refused() -> None:
    async with serving(Server(waits)) as server, engine_of(server) as engine:
        request_id = uuid.uuid4().hex
        running = asyncio.create_task(sample(engine, [1], request_id))
        await server.got_one.wait()
        with pytest.raises(EngineError, match="already in flight"):
            await sample(engine, [1], request_id)
        server.release.set()
        await running


# ---------------------------------------------------------------------- at the start


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["http://a", "http://a/"],
        ["localhost:30000"],
        ["http://"],
        ["http:///x"],
        ["http://h:port"],
        ["http://h:99999"],
        ["http://[::1"],
        ["http://h/?key=1"],
        ["http://h/#x"],
        ["http://me:s3cret@h:port"],
    ],
)
def test_different_http_addresses_are_asked_for(urls: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.server\.urls[^\n]+$") as raised:
        SGLangServerEngine(urls)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://h", "http://h:1/path/", "https://h//", "http://[::1]:30000", "http://me:x@h:1"]
)
async def test_an_address_may_have_a_path_and_a_slash_at_its_end(url: str) -> None:
    engine = SGLangServerEngine([url])
    assert not engine.describe()["url"].endswith("/")
    await engine.close()


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read_are_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content:
        (tmp_path / "ca.pem").write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match=r"^[^\n]*SSL_CERT_FILE[^\n]+$"):
        SGLangServerEngine(["http://h"])


@pytest.mark.parametrize("key", ["k\u00fcy", "s3cret\nX-More: 1", "a\x00b"])
def test_a_key_that_is_no_header_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.server\.api_key [^\n]+$") as raised:
        SGLangServerEngine(["http://h"], key)
    assert "s3cret" not in str(raised.value)


async def test_the_newline_of_a_keys_file_is_no_part_of_it() -> None:
    async with serving(Server(answers)) as server, engine_of(server, api_key="k\n") as engine:
        await sample(engine, [1])
        assert server.headers[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        (
            "/get_server_info",
            JSONResponse({"error": "Unauthorized"}, 401),
            "status 401: Unauthorized; check rollout.server.api_key",
        ),
        (
            "/get_server_info",
            PlainTextResponse("<html>\nhello"),
            "returned '<html>",
        ),
        ("/get_server_info", PlainTextResponse('{"model_path": '), "instead of JSON"),
        (
            "/health",
            RedirectResponse("https://me:s3cret@h/x"),
            "status 307: a redirect to https://h/x; redirects are not followed",
        ),
        (
            "/health",
            Response(status_code=503),
            "GET /health: status 503; check rollout.server.urls",
        ),
    ],
)
async def test_what_is_wrong_at_the_start_is_one_line(
    path: str, answer: Response, says: str
) -> None:
    async with serving(Server(answers)) as server:
        server.says[path] = answer
        engine = SGLangServerEngine([server.url], "k")
        with pytest.raises(
            EngineStartError,
            match=r"^[^\n]*http://[^\n]+rollout\.server\.urls[^\n]*$",
        ) as raised:
            await engine.connect()
        assert says in str(raised.value)
        assert "s3cret" not in str(raised.value)
        assert server.bodies == []


async def test_a_server_of_another_kind_is_refused() -> None:
    """vLLM's has /health, and neither /get_server_info nor /generate."""
    async with serving(Server(answers)) as server:
        server.says = {
            path: Response(status_code=404) for path in ("/get_server_info", "/generate")
        }
        with pytest.raises(EngineStartError, match="/generate"):
            await SGLangServerEngine([server.url]).connect()


async def test_a_router_need_not_say_what_it_serves() -> None:
    async with serving(Server(answers)) as one, serving(Server(answers)) as two:
        one.says["/get_server_info"] = Response(status_code=404)
        engine = SGLangServerEngine([one.url, two.url])
        await engine.connect()
        assert engine.served() == {"model_path": "/models/m", "weight_version": "default"}
        two.says["/get_server_info"] = Response(status_code=501)
        two.says["/get_model_info"] = JSONResponse(
            {"model_path": "/models/n", "is_generation": True}
        )
        await engine.connect()
        assert engine.served() == {"model_path": "/models/n"}
        await engine.close()


async def test_a_server_that_never_answers_is_not_waited_for_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_server, "HEALTH_S", 0.2)
    async with serving(Server(answers)) as server:
        server.hangs = True
        with pytest.raises(EngineStartError, match=r"GET /health: .*timeout"):
            await SGLangServerEngine([server.url]).connect()


async def test_a_proxy_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:s3cret@127.0.0.1:{free_port()}")
    with pytest.raises(
        EngineStartError,
        match=r"proxy http://127\S+; NO_PROXY=h\.invalid",
    ) as raised:
        await SGLangServerEngine(["http://h.invalid:1"]).connect()
    assert "s3cret" not in str(raised.value)
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"^rollout\.server\.urls: .*proxy"):
        SGLangServerEngine(["http://h.invalid:1"])
    async with serving(Server(answers)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        engine = SGLangServerEngine([server.url])
        await engine.connect()
        await engine.close()


# ---------------------------------------------------------------------- SGLang's own server


@pytest.mark.engine
@pytest.mark.slow
async def test_sglangs_own_server_end_to_end(tiny_server: OwnServer) -> None:
    ids = tokenizer_at(base_model_dir()).apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    expected = transformers_greedy(tiny_server.model, ids, 16)
    length = next(n for n in range(6, 17) if expected[n - 1] not in expected[: n - 1])
    stop = expected[length - 1]
    engine = SGLangServerEngine([tiny_server.url])
    await engine.connect()
    assert engine.describe()["version"] == "0.5.5"
    assert (await sample(engine, ids)).token_ids == expected
    first = await sample(engine, ids, stop_token_ids=[stop])
    assert first.token_ids == expected[:length]
    assert (first.finish_reason, first.token_ids[-1], first.prompt_tokens) == (
        "stop",
        stop,
        len(ids),
    )
    assert all(isinstance(value, float) for value in first.logprobs)
    second = await sample(engine, [*ids, *expected, 198])
    assert second.cached_tokens == len(ids) + len(expected) - 1
    with pytest.raises(EngineError, match="status 400"):
        await sample(engine, [1] * 9000)
    await check_stops(engine, tiny_server.url)
    await engine.close()


def transformers_greedy(model: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens after `ids`, by transformers' own forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole = list(ids)
    for _ in range(count):
        with torch.no_grad():
            whole.append(int(llama(torch.tensor([whole])).logits[0, -1].argmax()))
    return whole[len(ids) :]


async def check_stops(engine: SGLangServerEngine, url: str) -> None:
    """Aborted and cancelled requests end on the server too, by its own figures."""
    aborted = uuid.uuid4().hex
    tasks = [
        asyncio.create_task(
            sample(engine, [1, 2], request_id, max_new_tokens=1900, ignore_eos=True)
        )
        for request_id in (aborted, *(uuid.uuid4().hex for _ in range(5)))
    ]
    await until_load(url, 6)
    await engine.abort(aborted)
    assert (await tasks[0]).finish_reason == "abort"
    for task in tasks[1:]:
        task.cancel()
    assert all(
        isinstance(result, asyncio.CancelledError)
        for result in await asyncio.gather(*tasks[1:], return_exceptions=True)
    )
    await until_load(url, 0)


async def until_load(url: str, requests: int) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(60):
        while (await client.get(f"{url}/get_load")).json()[0]["num_reqs"] != requests:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
