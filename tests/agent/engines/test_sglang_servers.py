"""Several servers as one engine: routing, fail-over, restarts, TLS, and SGLang's own router."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from starlette.responses import Response

from agent.engines import server as one_server
from agent.engines import servers as sglang_server
from agent.engines.engine import Generation
from agent.engines.servers import SGLangServerEngine
from agent.errors import EngineError, EngineStartError
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import Runtime
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.agent import native_server
from tests.agent.engines.conftest import OwnServer
from tests.agent.native_api import (
    Server,
    answers,
    free_port,
    healthy,
    serving,
    status,
    waits,
)
from tests.helpers import settings, task
from tools.function import tool
from tools.toolset import ToolSet


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(one_server, "HEALTH_EVERY_S", 0.05)


@contextlib.asynccontextmanager
async def engine_of(*servers: Server, **options: Any) -> AsyncIterator[SGLangServerEngine]:
    engine = SGLangServerEngine([server.url for server in servers], **options)
    try:
        await engine.connect()
        yield engine
    finally:
        await engine.close()


async def sample(engine: SGLangServerEngine, ids: list[int]) -> Generation:
    return await engine.generate(
        ids, {"temperature": 0.0, "max_new_tokens": 16}, request_id=uuid.uuid4().hex
    )


async def turns(engine: SGLangServerEngine, first: int, count: int = 3) -> None:
    """A conversation of `count` turns, whose first token says which one it is."""
    ids = [first]
    for _ in range(count):
        ids += (await sample(engine, ids)).token_ids


def served(server: Server) -> list[int]:
    """The conversation of each request."""
    return [body["input_ids"][0] for body in server.bodies]


# ---------------------------------------------------------------------- routing


async def test_conversations_spread_evenly_and_each_stays_where_it_is() -> None:
    async with (
        serving(Server(answers)) as one,
        serving(Server(answers)) as two,
        engine_of(one, two) as engine,
    ):
        await asyncio.gather(*(turns(engine, number) for number in range(10)))
        assert len(set(served(one))) == len(set(served(two))) == 5
        assert not set(served(one)) & set(served(two))


async def test_one_that_ended_counts_no_more() -> None:
    async with (
        serving(Server(waits)) as one,
        serving(Server(answers)) as two,
        engine_of(one, two) as engine,
    ):
        held = asyncio.create_task(turns(engine, 0))
        await one.got_one.wait()
        for number in range(1, 5):
            await asyncio.create_task(turns(engine, number))
        assert (served(one), set(served(two))) == ([0], {1, 2, 3, 4})
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held


async def test_a_server_that_is_gone_loses_its_conversations_to_the_other() -> None:
    async with (
        serving(Server(answers)) as two,
        serving(Server(waits)) as one,
        engine_of(one, two) as engine,
    ):
        running = asyncio.create_task(turns(engine, 7))
        await one.got_one.wait()
        one.up = False
        engine._servers[0].lost("gone")
        await engine._servers[0]._turns.aclose()  # every connection breaks
        await running
    assert served(one) == [7]
    assert served(two) == [7, 7, 7]


async def test_a_poisoned_turn_does_not_go_round_for_ever() -> None:
    async with (
        serving(Server(status(500, "boom"))) as one,
        serving(Server(status(500, "boom"))) as two,
    ):
        async with engine_of(one, two, attempts=4) as engine:
            with pytest.raises(EngineError, match=r"4 times.* 500: boom"):
                await sample(engine, [1])
        assert len(one.bodies) + len(two.bodies) == 4


async def test_nobody_asks_a_server_that_is_down_but_the_watcher() -> None:
    async with serving(Server(answers)) as server, engine_of(server) as engine:
        server.up = False
        engine._servers[0].lost("said the test")
        running = asyncio.create_task(sample(engine, [1]))
        await asyncio.sleep(0.2)
        assert server.bodies == []
        server.up = True
        assert (await running).token_ids == [5, 2]


async def test_a_server_that_hangs_loses_its_conversations_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes connections and never answers, neither the turn nor whether it is well: a stopped
    process, a machine cut off.
    """
    monkeypatch.setattr(one_server, "HEALTH_S", 0.2)
    for module in (one_server, sglang_server):
        monkeypatch.setattr(module, "SILENCE_S", 0.1)
    async with (
        serving(Server(answers)) as two,
        serving(Server(waits)) as one,
        engine_of(one, two) as engine,
    ):
        running = asyncio.create_task(turns(engine, 7))
        await one.got_one.wait()
        one.hangs = True
        await running
        one.hangs = False
    assert (served(one), served(two)) == ([7], [7, 7, 7])


async def test_a_long_turn_of_a_server_that_is_well_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (one_server, sglang_server):
        monkeypatch.setattr(module, "SILENCE_S", 0.05)
    async with serving(Server(waits)) as server, engine_of(server) as engine:
        running = asyncio.create_task(sample(engine, [1]))
        await asyncio.sleep(0.4)
        server.says["/health"] = Response(
            status_code=503
        )  # it says that it is not well: it may answer all the same
        await asyncio.sleep(0.4)
        server.release.set()
        assert (await running).token_ids == [5]
        assert len(server.bodies) == 1


async def test_a_proxy_that_lost_its_server_loses_its_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        serving(Server(answers)) as two,
        serving(Server(status(502, "bad gateway"))) as one,
        engine_of(one, two) as engine,
    ):
        one.up = False
        async with asyncio.timeout(20):
            await turns(engine, 7)
    assert served(two) == [7, 7, 7]


async def test_waiting_has_an_end_that_says_what_is_wrong() -> None:
    async with serving(Server(answers)) as server, engine_of(server, wait_s=0.2) as engine:
        server.up = False
        engine._servers[0].lost("gone")
        with pytest.raises(EngineError, match=r"0\.2 s: http://\S+: .*503"):
            await sample(engine, [1])


async def test_one_that_comes_back_with_another_model_stays_out() -> None:
    async with serving(Server(answers)) as server, engine_of(server, wait_s=0.3) as engine:
        server.model = "/models/other"
        engine._servers[0].lost("gone")
        with pytest.raises(EngineError, match=r"/models/other .*/models/m"):
            await sample(engine, [1])


async def test_servers_of_different_models_are_refused() -> None:
    async with serving(Server(answers)) as one, serving(Server(answers)) as two:
        two.model = "/models/other"
        with pytest.raises(EngineStartError, match=r"different.*/models/m, .*/models/other"):
            async with engine_of(one, two):
                pass


# ---------------------------------------------------------------------- TLS


async def test_a_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, roots = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "roots.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(roots)
    async with serving(Server(answers), ssl_certfile=chain, ssl_keyfile=key) as server:
        with pytest.raises(
            EngineStartError,
            match=r"https://\S+: .*certificate",
        ):
            async with engine_of(server):
                pass
        monkeypatch.setenv("SSL_CERT_FILE", str(roots))
        assert ssl.get_default_verify_paths().cafile == str(roots)
        async with engine_of(server) as engine:
            assert (await sample(engine, [1])).token_ids == [5, 2]


# ---------------------------------------------------------------------- restarts under load


CONVERSATIONS, KILLS = 64, 5
# Of SGLang's own server, which takes ten seconds and more to start.
SGLANG_KILLS = int(os.environ.get("TURNTRACE_SGLANG_KILLS", "1"))


@pytest.mark.slow
async def test_a_server_killed_five_times_under_64_conversations(smollm2: ChatTemplate) -> None:
    """Whole conversations with tool calls: every record is the one that an undisturbed server
    gives.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    engine = SGLangServerEngine([url])
    native = native_server.Native(port)
    records: dict[str, Trajectory] = {}
    try:
        await healthy(url)
        await engine.connect()
        shared = Runtime(
            engine,
            smollm2,
            settings(),
            Dispatcher(ToolSet.from_tools([look]), max_parallel_calls=1, shorten=lambda text: None),
        )
        tasks = [
            task(f"t{number}", messages=[{"role": "user", "content": f"q:{number}"}])
            for number in range(CONVERSATIONS)
        ]
        running = asyncio.create_task(
            run_tasks(tasks, shared, on_done=lambda record: records.update({record.id: record}))
        )
        for _ in range(KILLS):
            await asyncio.sleep(
                native_server.DELAY_S / 2
            )  # in the midst of a turn of each conversation
            assert not running.done()
            native.kill()
            native.start()
            await healthy(url)
        await running
    finally:
        native.stop()
        await engine.close()
    assert len(records) == CONVERSATIONS
    for record in records.values():
        assert (record.stop_reason, record.infra_error, record.num_turns) == (
            "stop",
            False,
            native_server.CALLS + 1,
        )
        ids = record.prompt_ids + record.response_ids
        assert all(
            ids[turn.start : turn.end] == native_server.sampled(smollm2, ids[: turn.start])
            for turn in record.turns
        )


@tool
def look(question: str) -> str:
    """Looks something up."""
    return f"about {question}"


async def greedy(engine: SGLangServerEngine, number: int) -> list[int]:
    """Eight turns of 16 tokens, with something of ours after each."""
    ids = [100 + number, 7, 8, 9]
    for turn in range(8):
        sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
        ids += (await engine.generate(ids, sampling, request_id=uuid.uuid4().hex)).token_ids
        ids += [200 + turn, 10]
    return ids


@pytest.mark.engine
@pytest.mark.slow
async def test_sglangs_own_server_killed_under_load(tiny_server: OwnServer) -> None:
    engine = SGLangServerEngine([tiny_server.url])
    await engine.connect()
    undisturbed = await asyncio.gather(*(greedy(engine, number) for number in range(CONVERSATIONS)))
    running = asyncio.gather(*(greedy(engine, number) for number in range(CONVERSATIONS)))
    for _ in range(SGLANG_KILLS):
        await asyncio.sleep(0.5)
        tiny_server.kill()
        assert not running.done()
        tiny_server.start()
        await healthy(tiny_server.url)
    assert await running == undisturbed
    await engine.close()


# ---------------------------------------------------------------------- SGLang's router


@contextlib.asynccontextmanager
async def routed(log: Path, *servers: Server) -> AsyncIterator[str]:
    """The address of `sglang_router` in front of the servers."""
    port = free_port()
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--worker-urls",
        *(server.url for server in servers),
    ]
    with log.open("w") as output:
        router = subprocess.Popen(  # noqa: ASYNC220 - a moment
            [sys.executable, "-m", "sglang_router.launch_router", *options],
            stdout=output,
            stderr=output,
        )
    try:
        await healthy(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        router.terminate()
        router.wait()


async def until_cut_off(server: Server, body: dict[str, Any]) -> Response:
    """As SGLang does: a request whose client has gone is aborted."""
    while not await server.requests[-1].is_disconnected():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    server.aborted.append(body["rid"])
    return await answers(server, body)


async def test_a_router_by_its_url(tmp_path: Path) -> None:
    async with (
        serving(Server(answers)) as one,
        serving(Server(answers)) as two,
        routed(tmp_path / "log", one, two) as url,
    ):
        engine = SGLangServerEngine([url])
        await engine.connect()
        await asyncio.gather(*(turns(engine, number) for number in range(8)))
        assert sorted(served(one) + served(two)) == sorted([*range(8)] * 3)
        await engine.close()


async def test_a_turn_cancelled_through_a_router_ends_on_the_server(tmp_path: Path) -> None:
    """The router has no /abort_request: it is the connection that ends."""
    async with serving(Server(until_cut_off)) as server, routed(tmp_path / "log", server) as url:
        engine = SGLangServerEngine([url])
        running = asyncio.create_task(sample(engine, [1]))
        await server.got_one.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(20):
            while server.aborted != [server.bodies[0]["rid"]]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await engine.close()
