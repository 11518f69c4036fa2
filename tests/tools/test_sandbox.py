"""Rules: a failing program is an answer, a failing sandbox is a BackendError; nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.tools.servers.sandbox.processes import eventually, process_of, programs_of
from tools.base import BackendError, SandboxUnavailable, ToolConfigError, ToolError
from tools.registry import ToolSet, load_tools
from tools.sandbox import SandboxFusionTool
from tools.sandbox_sessions import LOST, OVER
from tools.servers import embedded


def schema(**properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string"}, **properties},
        "required": ["code"],
    }
    return {
        "type": "function",
        "function": {"name": "code_interpreter", "description": "", "parameters": parameters},
    }


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    """Keeps the embedded server running between tests, which have tools and loops of their own."""
    embedded.sandbox.acquire()
    yield
    embedded.sandbox.release()


async def run(
    config: dict[str, Any], code: str, tool_schema: dict[str, Any] | None = None, **more: Any
) -> tuple[str | None, dict[str, Any]]:
    tool = SandboxFusionTool(config, tool_schema or schema())
    try:
        response, reward, metrics = await tool.execute("t", {"code": code, **more})
        assert reward is None
        return response.text, metrics
    finally:
        await tool.close()


async def failing(config: dict[str, Any], code: str, **more: Any) -> ToolError:
    with pytest.raises(ToolError) as caught:
        await run(config, code, **more)
    return caught.value


# -- on the embedded server -----------------------------------------------------------------------


@pytest.mark.usefixtures("running")
async def test_what_a_program_prints_is_the_answer() -> None:
    text, metrics = await run({}, "import sys; print('out'); print('err', file=sys.stderr)")
    assert text == "out\nerr\n"
    assert metrics.pop("execution_time") > 0
    assert metrics == {"status": "Finished", "return_code": 0}


@pytest.mark.usefixtures("running")
async def test_silence_is_said_plainly() -> None:
    assert (await run({"sandbox_fusion_url": "embedded"}, "x = 1"))[
        0
    ] == "The code ran and printed nothing."


@pytest.mark.usefixtures("running")
async def test_a_traceback_is_told_as_python_writes_it() -> None:
    error = await failing({}, "print('so far')\n1 / 0")
    assert str(error).startswith(
        'so far\nTraceback (most recent call last):\n  File "/tmp/main.py", line 2'
    )
    assert str(error).endswith("ZeroDivisionError: division by zero\n")
    assert (error.metrics["status"], error.metrics["return_code"]) == ("Finished", 1)


@pytest.mark.usefixtures("running")
async def test_other_ends_are_told_in_words() -> None:
    assert str(await failing({}, "raise SystemExit(3)")) == "Exit code: 3"
    assert str(await failing({}, "raise SystemExit(1)")) == "Exit code: 1"
    assert str(await failing({}, "print('a', end=''); import os; os._exit(9)")) == "a\nExit code: 9"
    timed_out = await failing({"default_timeout": 0.5}, "print('a')\nwhile True: pass")
    assert str(timed_out) == "a\nThe time limit of 0.5 s was exceeded."
    assert timed_out.metrics["status"] == "TimeLimitExceeded"


@pytest.mark.usefixtures("running")
async def test_config_reaches_the_sandbox() -> None:
    assert (await run({"default_language": "bash"}, "echo $0"))[0] == "/tmp/main.sh\n"
    assert "MemoryError" in str(await failing({"memory_limit_mb": 128}, "bytearray(200 << 20)"))


@pytest.mark.usefixtures("running")
async def test_a_language_that_the_server_lacks_is_told_at_the_start() -> None:
    tool = SandboxFusionTool({"default_language": "cobol"}, schema())
    with pytest.raises(
        ToolConfigError,
        match=r"config\.default_language: .*'cobol'.*python, bash",
    ):
        await tool.start()
    await tool.close()
    tool = SandboxFusionTool({"default_language": "bash"}, schema())
    await tool.start()
    await tool.close()


@pytest.mark.usefixtures("running")
async def test_parameters_count_only_where_the_schema_offers_them() -> None:
    assert (await run({}, "print(1)", language="bash", timeout=1e-9))[0] == "1\n"
    offering = schema(language={"type": "string"}, timeout={"type": "number"})
    assert (await run({}, "echo 1", offering, language="bash", timeout=1000))[0] == "1\n"
    with pytest.raises(ToolError, match=r"'cobol'.*python, bash"):
        await run({}, "x", offering, language="cobol")


@pytest.mark.usefixtures("running")
async def test_a_timeout_that_is_none_is_the_models_mistake() -> None:
    offering = schema(timeout={})
    for wrong in (0, -1, float("nan"), True, "9", [], {}):
        with pytest.raises(ToolError, match=r"^timeout .*seconds"):
            await run({}, "print(1)", offering, timeout=wrong)
    for right in (None, 1, 10**400, float("inf")):
        assert (await run({}, "print(1)", offering, timeout=right))[0] == "1\n"


@pytest.mark.usefixtures("running")
async def test_half_a_surrogate_pair_does_no_harm() -> None:
    assert (await run({}, "print('\ud83d')"))[0] == "?\n"


@pytest.mark.usefixtures("running")
async def test_the_loop_runs_on_and_the_calls_overlap() -> None:
    tool = SandboxFusionTool({}, schema())
    gaps, last = [], time.monotonic()
    work = asyncio.gather(*(tool.execute("t", {"code": f"print({i})"}) for i in range(6)))
    while not work.done():
        await asyncio.sleep(0.005)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
    assert [response.text for response, _, _ in await work] == [f"{i}\n" for i in range(6)]
    assert len(gaps) > 3
    await tool.close()


@pytest.mark.usefixtures("running")
def test_one_tool_serves_several_loops_in_turn() -> None:
    tool = SandboxFusionTool({}, schema())
    for _ in range(2):
        assert asyncio.run(tool.execute("t", {"code": "print(1)"}))[0].text == "1\n"
    asyncio.run(tool.close())


async def test_the_demo_pair_serves_a_conversation() -> None:
    tools = load_tools("gsm8k")
    assert list(tools) == ["code_interpreter", "calculate_answer"]
    code, answer = tools["code_interpreter"], tools["calculate_answer"]
    for loaded in (code, answer):
        await loaded.tool.create("t", **loaded.create_kwargs({}, ground_truth="42"))
    assert code.validate({"code": "print(6 * 7)"}) == []
    printed, _, _ = await code.tool.execute("t", {"code": "print(6 * 7)"})
    said, step, _ = await answer.tool.execute("t", {"answer": (printed.text or "").strip()})
    assert (said.text, step) == ("Current parsed answer='42' reward=1.0", 0.0)
    assert [await loaded.tool.calc_reward("t") for loaded in (code, answer)] == [None, 1.0]
    for loaded in (code, answer):
        await loaded.tool.release("t")
    await tools.close()


@pytest.mark.parametrize("config", [{"packages": ["no-such-package-at-all"]}])
async def test_a_package_that_is_not_installed_is_told_at_the_start(config: dict[str, Any]) -> None:
    tool = SandboxFusionTool(config, schema())
    with pytest.raises(SandboxUnavailable, match="'no-such-package-at-all'"):
        await tool.start()
    await tool.close()


# -- sessions -------------------------------------------------------------------------------------


@pytest.fixture
async def session(running: None) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Calls a tool with sessions: (code, trajectory) to the text. Afterwards nothing is left."""
    tool = SandboxFusionTool({"session": True, "default_timeout": 2}, schema())
    await tool.start()

    async def call(code: str, trajectory: str = "t") -> str:
        try:
            return (await tool.execute(trajectory, {"code": code}))[0].text or ""
        except ToolError as error:
            return str(error)

    call.tool = tool  # type: ignore[attr-defined]
    yield call
    await tool.close()
    eventually(lambda: not programs_of(embedded.sandbox))


async def test_variables_live_on_in_a_trajectory_and_in_no_other(session: Any) -> None:
    assert await session("x = 41") == "The code ran and printed nothing."
    assert await session("print(x + 1)") == "42\n"
    assert "NameError: name 'x' is not defined" in await session("print(x)", "other")
    assert "ZeroDivisionError" in await session("1 / 0")
    assert await session("print(x)") == "41\n"


async def test_release_ends_the_session(session: Any) -> None:
    await session("x = 1", "one")
    await session("x = 2", "two")
    await session.tool.release("one")
    await session.tool.release("never seen")
    eventually(
        lambda: (
            [process.status() for process in programs_of(embedded.sandbox)].count("stopped") == 1
        )
    )
    assert "NameError" in await session("print(x)", "one")
    assert await session("print(x)", "two") == "2\n"


async def test_a_time_limit_ends_the_session_and_says_so(session: Any) -> None:
    await session("x = 1")
    assert (
        await session("print('a')\nwhile True: pass")
        == f"a\nThe time limit of 2 s was exceeded.\n{OVER}"
    )
    assert "NameError" in await session("print(x)")


async def test_a_session_that_ended_by_itself_is_told_of(session: Any) -> None:
    assert await session("import os; os._exit(3)") == f"Exit code: 3\n{OVER}"
    assert await session("print(1)") == "1\n"


async def test_a_cancelled_call_ends_the_session_and_the_next_is_told(session: Any) -> None:
    await session("x = 1")
    call = asyncio.create_task(session("import time; time.sleep(60)"))
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    eventually(lambda: not programs_of(embedded.sandbox))
    assert await session("print(1)") == f"{LOST}\n1\n"
    assert await session("print(2)") == "2\n"


async def test_a_server_that_died_took_the_sessions_along(session: Any) -> None:
    await session("x = 1")
    process_of(embedded.sandbox).kill()
    eventually(lambda: not embedded.sandbox.is_running)
    assert await session("print(1)") == f"{LOST}\n1\n"


# -- on a server that answers as it is told -------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Starts an HTTP server with one answer to everything; returns its address and the requests."""
    servers = []

    def start(status: int, body: Any, *, close: bool = False) -> tuple[str, list[Any]]:
        seen: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                seen.append(
                    (self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
                )
                if not close:
                    self.answer()

            def answer(self) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[..., tuple[str, list[Any]]]


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, {"status": "Success"}), (404, {"detail": "Not Found"}), (404, b"<html>"), (200, [1])],
)
async def test_a_server_that_does_not_say_what_it_runs_is_taken_at_the_configs_word(
    serve: Serve, status: int, body: Any
) -> None:
    url, _ = serve(status, body)
    tool = SandboxFusionTool({"sandbox_fusion_url": url, "default_language": "verilog"}, schema())
    await tool.start()
    await tool.close()


async def test_what_goes_over_the_wire(serve: Serve) -> None:
    url, seen = serve(
        200,
        {
            "status": "Success",
            "run_result": {"status": "Finished", "return_code": 0, "stdout": "hi"},
        },
    )
    config = {
        "default_timeout": 7,
        "memory_limit_mb": 512,
        "default_language": "cpp",
        "num_workers": 3,
        "rate_limit": 5,
    }
    for address in (url, f"{url}/", f"{url}/run_code"):
        assert (await run({**config, "sandbox_fusion_url": address}, "int main(){}"))[0] == "hi"
    wire = {
        "code": "int main(){}",
        "language": "cpp",
        "run_timeout": 7.0,
        "compile_timeout": 7.0,
        "memory_limit_MB": 512,
    }
    assert seen == [("/run_code", {**wire, "stdin": None, "files": {}, "fetch_files": []})] * 3


async def test_a_compile_error_is_told_to_the_model(serve: Serve) -> None:
    compiled = {
        "status": "Finished",
        "return_code": 2,
        "stdout": "",
        "stderr": "error: expected ';'\n",
        "execution_time": 0.1,
    }
    url, _ = serve(
        200, {"status": "Failed", "message": "", "compile_result": compiled, "run_result": None}
    )
    assert (
        str(await failing({"sandbox_fusion_url": url}, "x")) == "error: expected ';'\nExit code: 2"
    )


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, {"status": "SandboxError", "message": "no disk"}, "the sandbox failed: no disk"),
        (200, {"status": "Failed", "message": "odd"}, "answered Failed without a result: odd"),
        (200, b"<html>", "invalid answer: Invalid JSON"),
        (200, {"status": "Maybe"}, "invalid answer: status must be"),
        (422, {"detail": "no such language"}, "422"),
        (500, b"oops", "500"),
        (302, b"", "302"),
    ],
)
async def test_a_broken_sandbox_is_the_backends_fault(
    serve: Serve, status: int, body: Any, said: str
) -> None:
    url, seen = serve(status, body)
    with pytest.raises(BackendError, match=said):
        await run({"sandbox_fusion_url": url}, "x")
    assert len(seen) == 1, "code must not run twice"


@pytest.mark.parametrize(
    ("status", "body"), [(404, {"detail": "Not Found"}), (200, {"status": "ok"}), (200, b"<html>")]
)
async def test_a_server_that_keeps_no_sessions_is_told_of_once_at_the_start(
    serve: Serve, status: int, body: Any
) -> None:
    url, _ = serve(status, body)
    tools = ToolSet.from_tools(
        [SandboxFusionTool({"sandbox_fusion_url": url, "session": True}, schema())]
    )
    with pytest.raises(
        ToolConfigError,
        match=r"code_interpreter: config\.session: .*sessions",
    ):
        await tools.start()
    await tools.close()


async def test_a_connection_that_breaks_is_the_backends_fault(serve: Serve) -> None:
    url, seen = serve(200, {}, close=True)
    with pytest.raises(BackendError, match="RemoteProtocolError"):
        await run({"sandbox_fusion_url": url}, "x")
    assert len(seen) == 1, "code must not run twice"


async def test_nobody_there_is_the_backends_fault(serve: Serve) -> None:
    with pytest.raises(BackendError, match="ConnectError"):
        await run({"sandbox_fusion_url": "http://127.0.0.1:9"}, "x")


@pytest.mark.parametrize(
    ("config", "key", "word"),
    [
        ({"sandbox_fusion_url": "localhost:8080"}, "sandbox_fusion_url", "'embedded' or an http"),
        ({"sandbox_fusion_url": 8080}, "sandbox_fusion_url", "text, got 8080"),
        ({"default_timeout": 0}, "default_timeout", "above 0"),
        ({"default_timeout": "30"}, "default_timeout", "number, got '30'"),
        ({"default_timeout": float("inf")}, "default_timeout", "finite"),
        ({"memory_limit_mb": "1G"}, "memory_limit_mb", "whole number"),
        ({"default_language": 3}, "default_language", "text, got 3"),
        ({"session": "yes"}, "session", "true or false"),
        ({"session": True, "default_language": "bash"}, "session", "is Python"),
        ({"packages": "numpy"}, "packages", "list, got 'numpy'"),
        ({"packages": ["numpy", ""]}, "packages.1", "empty"),
        (
            {"packages": ["numpy"], "sandbox_fusion_url": "http://sandbox"},
            "packages",
            "embedded server",
        ),
        ({"num_workers": 0}, "num_workers", "at least 1"),
        ({"num_workers": True}, "num_workers", "whole number"),
    ],
)
def test_a_wrong_config_is_named(config: dict[str, Any], key: str, word: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        ToolSet.from_tools([SandboxFusionTool(config, schema())])
    assert re.match(rf"config\.{re.escape(key)}[ :]", str(caught.value))
    assert word in str(caught.value)


def test_a_misspelt_key_of_the_config_is_named() -> None:
    with pytest.raises(ToolConfigError, match=r"'defualt_timeout'.*'default_timeout'"):
        ToolSet.from_tools([SandboxFusionTool({"defualt_timeout": 3}, schema())])


def test_calls_at_a_time_keep_the_embedded_servers_cores_busy_and_no_more() -> None:
    local, remote = ({"sandbox_fusion_url": url} for url in ("embedded", "http://sandbox:8080"))
    for config, workers in (
        (local, min(10, 2 * (os.cpu_count() or 1))),
        ({**local, "num_workers": 1}, 1),
        (remote, 10),
        ({**remote, "num_workers": 99}, 99),
    ):
        (loaded,) = ToolSet.from_tools([SandboxFusionTool(config, schema())]).values()
        assert loaded.policy.max_concurrency == workers


def test_a_call_may_take_as_long_as_the_code_and_then_some() -> None:
    (loaded,) = ToolSet.from_tools([SandboxFusionTool({"default_timeout": 100}, schema())]).values()
    assert loaded.policy.timeout_s > 200
