"""Rules: schemas reach the model as the server sends them; a call always ends; a server that dies
is started or reached again; nothing of a server outlives its tools."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from conversations.messages import ToolCall
from tests.command import ROOT, warm_address
from tests.helpers import hermes_template, until
from tests.tools.mcp import misbehaving
from tools.base import BackendError, ToolConfigError, ToolError
from tools.registry import load_tools
from tools.toolset import ToolSet

WARM_PYTHON = str(ROOT / "tests" / "warm_python.py")
SERVER = str(Path(__file__).with_name("misbehaving.py"))
EXAMPLE = {
    "command": "python",
    "args": ["-P", "-m", "tools.servers.mcp_example"],
    "env": {"PYTHONPATH": "${ROOT}"},
}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT", str(Path(__file__).parents[3]))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ToolSet]:
    """`load(mcp, **config)`: the tools of an entry."""

    def load_entry(mcp: Any, **config: Any) -> ToolSet:
        path = tmp_path / "tools.yaml"
        path.write_text(yaml.safe_dump([{"mcp": mcp, "config": config}]))
        return load_tools(path)

    return load_entry


class Server:
    """The misbehaving server, over one of its transports; `mcp` is what an entry says of it."""

    def __init__(self, kind: str, log: Path) -> None:
        self.kind = kind
        self.log = log
        self._child: subprocess.Popen[str] | None = None
        self._port = 0
        args = [WARM_PYTHON, warm_address(), SERVER, "stdio", str(log)]
        self.mcp: dict[str, Any] = {"command": "python", "args": args}
        if kind != "stdio":
            self.start()
            self.mcp = {"url": f"http://127.0.0.1:{self._port}/mcp"}

    def start(self) -> None:
        """Over HTTP the server is ours to start, again on the same port if it was there before."""
        environment = {**os.environ, "PORT": str(self._port)}
        command = [sys.executable, SERVER, self.kind, str(self.log)]
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self._child.stdout
        self._port = int(self._child.stdout.readline())

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def stop(self) -> None:
        if self._child and self._child.stdout:
            self._child.kill()
            self._child.wait()
            self._child.stdout.close()


@pytest.fixture(params=["stdio", "http"])
def either(server_of: Callable[[str], Server], request: pytest.FixtureRequest) -> Server:
    return server_of(request.param)


@pytest.fixture(params=["stdio", "http", "json"])
def server(server_of: Callable[[str], Server], request: pytest.FixtureRequest) -> Server:
    return server_of(request.param)


@pytest.fixture
def stdio(server_of: Callable[[str], Server]) -> Server:
    return server_of("stdio")


@pytest.fixture
def server_of(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    made: list[Server] = []

    def make(kind: str) -> Server:
        made.append(Server(kind, tmp_path / "calls.log"))
        return made[-1]

    yield make
    for server in made:
        server.stop()


async def ask(tools: ToolSet, name: str, text: Any = "", instance: str = "t") -> str:
    response, reward, _ = await tools[name].tool.execute(instance, {"text": text})
    assert reward is None
    return str(response.text)


async def asked(tools: ToolSet, name: str, text: Any = "") -> str:
    """What came of a call: its text, or the class of what it raised."""
    try:
        return await ask(tools, name, text)
    except (ToolError, BackendError) as error:
        return "BackendError" if isinstance(error, BackendError) else f"ToolError: {error}"


def children() -> list[int]:
    """Servers that tools started, not the test, and that run."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended: a zombie is one of these
            if {SERVER, "stdio"} <= set(child.cmdline()):
                found.append(child.pid)
    return found


async def killed(pid: int) -> None:
    """Returns when the process is gone and our loop has had the time to see its pipes end."""
    os.kill(pid, signal.SIGKILL)
    await until(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    )
    await asyncio.sleep(0.2)


# ---------------------------------------------------------------------- what is offered


def test_every_page_is_listed_and_schemas_reach_the_prompt_as_the_server_says_them(
    either: Server, load: Any
) -> None:
    tools = load(either.mcp)
    assert list(tools) == ["schema", *misbehaving.NAMES]
    function = {"name": "schema", "description": "The schema.", "parameters": misbehaving.SCHEMA}
    assert tools.schemas[0] == {"type": "function", "function": function}
    template = hermes_template()
    prompt = "".join(
        template.decode(ids)
        for _, ids in template.prompt([{"role": "user", "content": "?"}], tools.schemas[:1])
    )
    assert json.dumps(tools.schemas[0], ensure_ascii=False) in prompt
    assert tools["schema"].validate({"either": {"x": 1}, "mode": 3}) != []
    assert tools["schema"].validate({"either": {"x": 1, "y": 2}, "mode": None, "größe": 0.5}) == []


def test_a_filter_chooses_and_orders(stdio: Server, load: Any) -> None:
    assert list(load({**stdio.mcp, "tools": ["slow", "echo"]})) == ["slow", "echo"]
    with pytest.raises(ToolConfigError, match=r"'ecko'.*'echo'"):
        load({**stdio.mcp, "tools": ["ecko"]})


def test_verls_form_reads_the_servers_of_a_json_file(stdio: Server, tmp_path: Path) -> None:
    servers = {"First one": stdio.mcp, "second": {**EXAMPLE, "type": "stdio"}}
    (tmp_path / "mcp_server.json").write_text(json.dumps({"mcpServers": servers}))
    entry = {
        "class_name": "verl.tools.mcp_search_tool.MCPSearchTool",
        "config": {"type": "mcp", "rate_limit": 120, "timeout": 7},
        "mcp": {"mcp_servers_config_path": "./mcp_server.json"},
    }
    (tmp_path / "tools.yaml").write_text(yaml.safe_dump({"tools": [entry]}))
    tools = load_tools(tmp_path / "tools.yaml")
    assert {"schema", "echo", "clock", "read_notes"} <= set(tools)
    assert tools["clock"].policy.timeout_s == 7


def test_verls_tool_selected_list_filters(tmp_path: Path) -> None:
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"example": EXAMPLE}}))
    mcp = {"mcp_servers_config_path": "servers.json", "tool_selected_list": ["convert"]}
    (tmp_path / "tools.yaml").write_text(
        yaml.safe_dump([{"class_name": "tools.mcp.McpTool", "config": {"type": "mcp"}, "mcp": mcp}])
    )
    assert list(load_tools(tmp_path / "tools.yaml")) == ["convert"]


async def test_a_subclass_shows_results_its_own_way(
    stdio: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_mcp.py").write_text(
        "from tools.mcp import McpTool\n"
        "class Loud(McpTool):\n"
        "    def shown(self, result): return super().shown(result).upper()\n"
    )
    (tmp_path / "tools.yaml").write_text(
        yaml.safe_dump([{"class_name": "my_mcp.Loud", "mcp": stdio.mcp}])
    )
    tools = load_tools(tmp_path / "tools.yaml")
    try:
        assert await ask(tools, "echo", "quiet") == "QUIET"
    finally:
        await tools.close()


def test_two_tools_of_one_name_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tools.yaml").write_text(
        yaml.safe_dump([{"mcp": EXAMPLE}, {"mcp": {**EXAMPLE, "tools": ["clock"]}}])
    )
    with pytest.raises(ToolConfigError, match=r"entry 1: .*'clock'.*entry 0"):
        load_tools(tmp_path / "tools.yaml")


async def test_a_config_loads_where_a_loop_runs_already(load: Any) -> None:
    assert list(load(EXAMPLE)) == ["clock", "convert", "write_note", "read_notes"]


REFUSED: list[tuple[Any, str]] = [
    ("x", "mcp must be a mapping, got 'x'"),
    ({"tools": ["a"]}, "mcp needs either command (a server to start) or url (a server to reach)"),
    (
        {"command": "a", "url": "http://b"},
        "mcp needs either command (a server to start) or url (a server to reach)",
    ),
    ({"comand": "a"}, "mcp has no key 'comand'; did you mean 'command'?"),
    ({"url": "ftp://b"}, "mcp.url must be an http(s) address, got 'ftp://b'"),
    ({"url": "http://[b"}, "mcp.url must be an http(s) address, got 'http://[b'"),
    ({"url": "http://"}, "mcp.url must be an http(s) address, got 'http://'"),
    ({"command": "a", "tools": []}, "mcp.tools must not be empty"),
    ({"command": "a", "args": "b"}, "mcp.args must be a list, got 'b'"),
    (
        {"command": "a", "start_timeout_s": 0},
        "mcp.start_timeout_s must be above 0, got 0",
    ),
    ({"command": "a", "cwd": "/no/such"}, "mcp.cwd: there is no folder /no/such"),
    (
        {"command": "a", "env": {"KEY": "${NO_SUCH_KEY}"}},
        "mcp.env.KEY: the environment has no variable NO_SUCH_KEY",
    ),
    (
        {"mcp_servers_config_path": "no.json"},
        "there is no no.json, neither here nor beside the tool config",
    ),
    ({"command": "true"}, "the MCP server `true` could not be reached: it ended"),
    ({"command": "cat"}, "the MCP server `cat` could not be reached: Invalid request parameters"),
    (
        {"command": "no-such-command"},
        "the MCP server `no-such-command` could not be reached: FileNotFoundError",
    ),
    (
        {"command": "python", "args": ["-c", "import nothing_like_it"]},
        "its last words: ModuleNotFoundError: No module named 'nothing_like_it'",
    ),
    (
        {"command": "sleep", "args": [60], "start_timeout_s": 0.2},
        "`sleep 60` could not be reached: no answer within 0.2 s",
    ),
    (
        {"url": "http://me:secret@127.0.0.1:9/mcp?key=1"},
        "the MCP server at http://127.0.0.1:9/mcp could not be reached: ConnectError",
    ),
]


@pytest.mark.parametrize(("mcp", "says"), REFUSED, ids=[says[:45] for _, says in REFUSED])
def test_a_mistake_is_one_line(
    load: Any, mcp: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ToolConfigError) as raised:
        load(mcp)
    assert [
        each for each in caplog.records if each.name != "asyncio"
    ] == []  # the SDK has nothing to add
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"class_name": "tools.mcp.McpTool", "tool_schema": {"function": {"name": "x"}}},
            "the entry has no mcp:",
        ),
        (
            {"class_name": "verl.tools.mcp_base_tool.MCPBaseTool", "config": {"type": "mcp"}},
            "but the entry has no mcp:",
        ),
        (
            {"class_name": "tools.gsm8k.Gsm8kTool", "mcp": EXAMPLE},
            "a class for mcp derives from tools.mcp.McpTool",
        ),
        (
            {"mcp": EXAMPLE, "tool_schema": {"function": {"name": "x"}}},
            "tool_schema has no place beside mcp",
        ),
        (
            {"mcp": EXAMPLE, "config": {"timeot": 3}},
            "config has no key 'timeot'; did you mean 'timeout'?",
        ),
    ],
)
def test_a_mistake_in_the_entry_is_one_line(
    tmp_path: Path, entry: dict[str, Any], says: str
) -> None:
    (tmp_path / "tools.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ToolConfigError) as raised:
        load_tools(tmp_path / "tools.yaml")
    assert says in str(raised.value)


# ---------------------------------------------------------------------- what is answered


async def test_answers(server: Server, load: Any) -> None:
    tools = load(server.mcp)
    try:
        assert await ask(tools, "echo", "héllo 漢字🙂\n\x00") == "héllo 漢字🙂\n\x00"
        assert await ask(tools, "echo", "half \ud83d") == "half ?"
        assert await ask(tools, "echo", 10**30) == str(10**30)
        assert await ask(tools, "huge", 5_000_000) == "x" * 5_000_000
        assert await ask(tools, "image", "before") == "before\nbehind"
        assert await ask(tools, "structured") == '{"größe": [1, {"a": null}]}'
        assert await ask(tools, "nothing") == ""
        assert await asked(tools, "error") == "ToolError: it did not work"
        assert await asked(tools, "raise", 7) == "ToolError: Error: no: 7"
        assert (
            await asked(tools, "echo", float("nan")) == "ToolError: Error: nan is no number in JSON"
        )
        nested: Any = 0
        for _ in range(5000):
            nested = [nested]
        assert (
            await asked(tools, "echo", nested)
            == "ToolError: Error: the arguments are nested too deeply"
        )
        for _ in range(4945):
            nested = nested[0]
        assert await ask(tools, "echo", nested) == str(nested)
    finally:
        await tools.close()


async def test_calls_at_once_get_each_its_own_answer(either: Server, load: Any) -> None:
    tools = load(either.mcp)
    try:
        texts = [f"call {index}" for index in range(20)]
        assert await asyncio.gather(*(ask(tools, "echo", text) for text in texts)) == texts
    finally:
        await tools.close()


async def test_what_a_server_prints_beside_the_protocol_harms_nobody(
    stdio: Server, load: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tools = load(stdio.mcp)
    try:
        assert await ask(tools, "garbage", "still here") == "still here"
    finally:
        await tools.close()
    assert capfd.readouterr() == ("", "")


async def test_a_started_server_gets_little_of_our_environment(
    stdio: Server, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_SECRET", "s3cret")
    tools = load({**stdio.mcp, "env": {"GIVEN": "${MY_SECRET}"}, "cwd": str(tmp_path)})
    try:
        names, folder, _ = json.loads(await ask(tools, "environment"))
    finally:
        await tools.close()
    assert "MY_SECRET" not in names
    assert {"GIVEN", "PATH"} <= set(names)
    assert folder == str(tmp_path)


# ---------------------------------------------------------------------- deaths, cancellations


async def test_a_death_ends_what_is_in_flight_and_the_next_call_meets_the_server_again(
    server: Server, load: Any
) -> None:
    tools = load(server.mcp)
    try:
        await tools.start()
        hanging = [asyncio.create_task(asked(tools, "hang")) for _ in range(3)]
        await until(lambda: server.said().count("called hang") == 3)
        assert await asked(tools, "die") == "BackendError"
        assert await asyncio.gather(*hanging) == ["BackendError"] * 3
        if server.kind != "stdio":
            server.stop()
            assert await asked(tools, "echo", "nobody there") == "BackendError"
            server.start()
        assert await ask(tools, "echo", "back") == "back"
    finally:
        await tools.close()


async def test_an_idle_death_is_not_even_noticed(stdio: Server, load: Any) -> None:
    tools = load(stdio.mcp)
    try:
        _, _, pid = json.loads(await ask(tools, "environment"))
        await killed(pid)
        assert await ask(tools, "echo", "again") == "again"
    finally:
        await tools.close()


async def test_a_server_that_stays_away_is_not_started_at_each_call(
    stdio: Server, load: Any, tmp_path: Path
) -> None:
    script = tmp_path / "starts.sh"
    script.write_text(
        f"#!/bin/sh\n"
        f"echo start >> {tmp_path}/starts\n"
        f"[ -e {tmp_path}/broken ] && exit 3\n"
        f'exec "$@"\n'
    )
    script.chmod(0o755)
    tools = load({"command": str(script), "args": [sys.executable, *stdio.mcp["args"]]})
    try:
        (tmp_path / "broken").touch()
        before = len((tmp_path / "starts").read_text().splitlines())
        for _ in range(20):
            assert await asked(tools, "echo") == "BackendError"
        assert len((tmp_path / "starts").read_text().splitlines()) - before < 5
        (tmp_path / "broken").unlink()
        async with asyncio.timeout(30):
            while await asked(tools, "echo", "back") != "back":  # noqa: ASYNC110 - what is waited for is a clock of the tool's
                await asyncio.sleep(0.1)
    finally:
        await tools.close()


async def test_a_cancelled_call_is_told_to_the_server_and_leaves_the_others_alone(
    server: Server, load: Any
) -> None:
    tools = load(server.mcp)
    try:
        other = asyncio.create_task(ask(tools, "slow", 0.5))
        hanging = asyncio.create_task(ask(tools, "hang"))
        await until(lambda: {"called hang", "called slow"} <= set(server.said()))
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        await until(lambda: "cancelled hang" in server.said())
        assert await other == "0.5"
        assert "cancelled slow" not in server.said()
    finally:
        await tools.close()


async def test_through_the_dispatcher_each_end_has_its_status(either: Server, load: Any) -> None:
    tools = load(either.mcp, timeout_s=3)
    await tools.start()
    conversation = await conversation_of(tools)
    calls = [
        made("echo", {"text": "a"}),
        made("hang", {}),
        made("error", {}),
        made("schema", {"either": "long"}),
    ]
    first, last = PendingTurn(0, calls), PendingTurn(1, [made("die", {})])
    try:
        await conversation.run(first)
        await conversation.run(last)
        await conversation.release()
    finally:
        await tools.close()
    lines = first.lines() + last.lines()
    assert [line.status for line in lines] == [
        "ok",
        "timeout",
        "tool_error",
        "invalid_arguments",
        "backend_error",
    ]
    assert [line.response for line in lines[:3]] == [
        "a",
        "Error: hang did not answer within 3 s",
        "it did not work",
    ]
    assert "dying" not in str(lines[4].response)


# ---------------------------------------------------------------------- state, and what is left


def made(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(name, arguments, raw="")


async def conversation_of(tools: ToolSet) -> ConversationTools:
    dispatcher = Dispatcher(
        tools, max_parallel_calls=16, shorten=lambda text, limit=None, side=None: None
    )
    conversation = ConversationTools(dispatcher, {}, None)
    await conversation.create()
    assert conversation.failure is None
    return conversation


async def say(conversation: ConversationTools, name: str, **arguments: Any) -> tuple[str, str]:
    call = made(name, arguments)
    turn = PendingTurn(0, [call])
    await conversation.run(turn)
    (line,) = turn.lines()
    return line.status, str(line.response)


@pytest.mark.parametrize(("per_trajectory", "seen"), [(False, "2"), (True, "1")])
async def test_a_trajectory_has_the_state_of_the_server_to_itself_where_it_asks_for_it(
    stdio: Server, load: Any, per_trajectory: bool, seen: str
) -> None:
    tools = load({**stdio.mcp, "tools": ["add", "count"], "per_trajectory": per_trajectory})
    try:
        await tools.start()
        first, second = await asyncio.gather(conversation_of(tools), conversation_of(tools))
        assert len(children()) == (0 if per_trajectory else 1)
        for conversation in (first, second):
            await say(conversation, "add", text="x")
        assert len(children()) == (2 if per_trajectory else 1)
        assert [await say(first, "count"), await say(second, "count")] == [("ok", seen)] * 2
        await first.release()
        assert len(children()) == 1
        await second.release()
        assert len(children()) == (0 if per_trajectory else 1)
    finally:
        await tools.close()
    assert children() == []


async def test_lost_state_is_said_before_the_server_is_started_again(
    stdio: Server, load: Any
) -> None:
    tools = load({**stdio.mcp, "tools": ["add", "count", "environment"], "per_trajectory": True})
    try:
        conversation = await conversation_of(tools)
        await say(conversation, "add", text="x")
        _, said = await say(conversation, "environment")
        await killed(json.loads(said)[2])
        assert (await say(conversation, "count"))[0] == "backend_error"
        assert await say(conversation, "count") == ("ok", "0")
        await conversation.release()
        assert children() == []
    finally:
        await tools.close()


async def test_closing_in_the_midst_of_a_call_leaves_nothing(either: Server, load: Any) -> None:
    tools = load(either.mcp)
    hanging = asyncio.create_task(asked(tools, "hang"))
    await until(lambda: "called hang" in either.said())
    await tools.close()
    assert await hanging == "BackendError"
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert children() == []
    await tools.close()


async def test_a_server_that_is_just_being_started_is_closed_too(stdio: Server, load: Any) -> None:
    tools = load(stdio.mcp)
    starting = asyncio.create_task(asked(tools, "echo", "x"))
    await until(lambda: children() != [])
    await tools.close()
    assert await starting == "BackendError"
    assert children() == []


def test_a_loop_that_ends_takes_the_servers_with_it(stdio: Server, load: Any) -> None:
    tools = load(stdio.mcp)

    async def start_and_leave() -> None:
        await tools.start()
        assert len(children()) == 1

    asyncio.run(start_and_leave())
    assert children() == []


def test_a_server_ends_when_we_are_killed(stdio: Server, tmp_path: Path) -> None:
    (tmp_path / "tools.yaml").write_text(yaml.safe_dump([{"mcp": stdio.mcp}]))
    code = f"""
import asyncio
from tools.registry import load_tools
tools = load_tools({str(tmp_path / "tools.yaml")!r})
async def main():
    await tools.start()
    print((await tools["environment"].tool.execute("t", {{}}))[0].text, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": os.environ["ROOT"]}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout
        pid = json.loads(child.stdout.readline())[2]
        child.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    assert not psutil.pid_exists(pid)


async def test_a_log_keeps_what_a_server_writes_to_stderr(
    stdio: Server, load: Any, tmp_path: Path
) -> None:
    tools = load({**stdio.mcp, "log": str(tmp_path / "server.log")})
    assert await asked(tools, "die") == "BackendError"
    await tools.close()
    assert (tmp_path / "server.log").read_text() == "dying as told\n"
