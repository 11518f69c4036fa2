"""Rules: a session remembers and is isolated; its end leaves nothing; between calls it stops."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tools.servers.sandbox.processes import (
    eventually,
    process_of,
    programs_of,
    running_server,
)
from tools.servers.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    yield from running_server("--sessions", "3", "--session-idle-s", "3")


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url(), timeout=60) as client:
        yield client
        eventually(lambda: not programs_of(server))


class Session:
    def __init__(self, client: httpx.Client, **body: Any) -> None:
        self.client = client
        self.path = (
            f"/v1/sessions/{client.post('/v1/sessions', json=body).raise_for_status().json()['id']}"
        )

    def run(self, code: str, **body: Any) -> dict[str, Any]:
        return self.client.post(f"{self.path}/run_code", json={"code": code, **body}).json()  # type: ignore[no-any-return]

    def printed(self, code: str, **body: Any) -> str:
        return str(self.run(code, **body)["run_result"]["stdout"])

    def end(self) -> int:
        return self.client.delete(self.path).status_code


@pytest.fixture
def session(client: httpx.Client) -> Iterator[Session]:
    session = Session(client)
    yield session
    session.end()


def test_variables_functions_and_files_live_on(session: Session) -> None:
    assert (
        session.printed("import math\nx = 41\ndef f(): return x + 1\nopen('a', 'w').write('kept')")
        == ""
    )
    assert (
        session.printed("print(f(), math.pi > 3, open('a').read(), __name__)")
        == "42 True kept __main__\n"
    )
    assert session.printed("x = 1; print(f())") == "2\n"


def test_there_is_no_echo(session: Session) -> None:
    assert session.run("1 + 1")["run_result"] | {"execution_time": 0} == {
        "status": "Finished", "execution_time": 0, "return_code": 0, "stdout": "", "stderr": "",
    }  # fmt: skip


def test_an_exception_and_an_exit_end_the_call_alone(session: Session) -> None:
    session.run("def divide():\n    return 1 / 0")
    failed = session.run("x = 1\ndivide()")
    assert (failed["status"], failed["session_ended"]) == ("Failed", False)
    assert failed["run_result"]["stderr"] == (
        'Traceback (most recent call last):\n  File "<call 2>", line 2, in <module>\n    divide()\n'
        '  File "<call 1>", line 2, in divide\n'
        "    return 1 / 0\n"
        "           ~~^~~\n"
        "ZeroDivisionError: division by zero\n"
    )
    assert session.run("x = (")["run_result"]["stderr"].endswith(
        "SyntaxError: '(' was never closed\n"
    )
    for code, exit_code in (
        ("exit()", 0),
        ("raise SystemExit(7)", 7),
        ("import sys; sys.exit('said')", 1),
    ):
        assert session.run(code)["run_result"]["return_code"] == exit_code
    assert session.printed("print(x)") == "1\n"


def test_stdin_is_each_calls_own(session: Session) -> None:
    assert session.printed("print(input())", stdin="one\nrest") == "one\n"
    assert session.printed("print(input())", stdin="two") == "two\n"
    assert session.run("input()")["run_result"]["stderr"].endswith(
        "EOFError: EOF when reading a line\n"
    )


def test_sessions_and_programs_see_nothing_of_each_other(client: httpx.Client) -> None:
    one, other = Session(client), Session(client)
    one.run(
        "secret = 1; open('/tmp/secret', 'w').write('x'); open('/dev/shm/secret', 'w').write('x')"
    )
    look = (
        "import os; print('secret' in globals(), os.listdir('/tmp'), "
        "os.listdir('/dev/shm'), sum(map(str.isdigit, os.listdir('/proc'))))"
    )
    assert other.printed(look) == "False [] [] 2\n"
    assert (
        client.post("/run_code", json={"code": look, "language": "python"}).json()["run_result"][
            "stdout"
        ]
        == "False ['main.py'] [] 2\n"
    )
    assert [one.end(), other.end(), one.end()] == [204, 204, 404]


def test_between_calls_it_stands_still(session: Session) -> None:
    counting = (
        "import threading, time\n"
        "n = 0\n"
        "def count():\n"
        "    global n\n"
        "    while True:\n"
        "        n += 1; time.sleep(0.001)\n"
    )
    session.run(counting + "threading.Thread(target=count, daemon=True).start()")
    before = int(session.printed("print(n)"))
    time.sleep(0.5)
    assert int(session.printed("print(n)")) - before < 100
    assert int(session.printed("time.sleep(0.5); print(n)")) - before > 100


@pytest.mark.parametrize(
    ("code", "status", "return_code"),
    [
        ("print('so far', flush=True)\nwhile True: pass", "TimeLimitExceeded", None),
        ("print('so far', flush=True)\nimport os; os._exit(3)", "Finished", 3),
        ("print('so far', flush=True)\nimport os; os.kill(0, 9)", "Finished", 137),
        (
            (
                "print('so far', flush=True)\n"
                "import os; os.fork() or os.setsid(); import time; time.sleep(60)"
            ),
            "TimeLimitExceeded",
            None,
        ),
        (
            (
                "print('so far', flush=True)\n"
                "import os; os.closerange(0, 99)\n"
                "import time; time.sleep(60)"
            ),
            "TimeLimitExceeded",
            None,
        ),
        ("print('so far', flush=True)\nwhile True: print('x' * 100000)", "Error", None),
    ],
)
def test_what_ends_it_says_so_and_leaves_nothing(
    client: httpx.Client, code: str, status: str, return_code: int | None
) -> None:
    session = Session(client)
    ended = session.run(code, run_timeout=1)
    assert (ended["session_ended"], ended["run_result"]["status"]) == (True, status)
    assert ended["run_result"]["stdout"].startswith("so far\n")
    assert return_code is None or ended["run_result"]["return_code"] == return_code
    assert "no such session" in session.run("print(1)")["detail"][0]["msg"]


def test_memory_in_sum_is_the_sessions_and_said_where_a_process_died_of_it(
    client: httpx.Client,
) -> None:
    session = Session(client, memory_limit_MB=200)
    assert "MemoryError" in session.run("x = bytearray(400 << 20)")["run_result"]["stderr"]
    bomb = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0: x = bytearray(80 << 20); time.sleep(9); "
        "os._exit(0)\n"
        "time.sleep(1)"
    )
    assert "limit of 200 MiB" in session.run(bomb)["run_result"]["stderr"]
    session.end()


def test_nobody_calls_so_it_ends(client: httpx.Client, server: EmbeddedServer) -> None:
    session = Session(client)
    assert programs_of(server)
    eventually(lambda: not programs_of(server))
    assert "no such session" in session.run("print(1)")["detail"][0]["msg"]


def test_there_are_only_so_many(client: httpx.Client) -> None:
    sessions = [Session(client) for _ in range(3)]
    refused = client.post("/v1/sessions", json={})
    assert (refused.status_code, refused.json()["detail"][0]["msg"]) == (
        429,
        "there are 3 sessions already, and no more are allowed at a time",
    )
    sessions[0].end()
    sessions[0] = Session(client)
    assert [session.end() for session in sessions] == [204] * 3


async def test_calls_of_one_session_come_one_after_the_other(
    client: httpx.Client, server: EmbeddedServer
) -> None:
    session = Session(client)
    session.run("seen = []")
    async with httpx.AsyncClient(base_url=server.url(), timeout=60) as many:
        bodies = [
            {"code": f"seen.append({i}); import time; time.sleep(0.02); seen.append({i})"}
            for i in range(6)
        ]
        await asyncio.gather(*(many.post(f"{session.path}/run_code", json=body) for body in bodies))
    seen = [int(number) for number in session.printed("print(*seen)").split()]
    assert seen[::2] == seen[1::2]
    assert sorted(seen[::2]) == list(range(6))
    session.end()


def test_a_client_that_hangs_up_ends_the_session(
    client: httpx.Client, server: EmbeddedServer
) -> None:
    session = Session(client)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url()}{session.path}/run_code",
            json={"code": "import time; time.sleep(60)", "run_timeout": 60},
            timeout=0.5,
        )
    eventually(lambda: not programs_of(server))


@pytest.mark.parametrize(
    "path", ["/v1/sessions/nope/run_code", "/v1/sessions/0123456789abcdef0123456789abcdef/run_code"]
)
def test_an_id_that_nobody_was_given_is_unknown(client: httpx.Client, path: str) -> None:
    assert client.post(path, json={"code": "print(1)"}).status_code == 404


def test_the_end_of_the_server_is_theirs() -> None:
    for server in running_server():
        with httpx.Client(base_url=server.url(), timeout=60) as client:
            Session(client).run("x = 1")
        left, pid = programs_of(server), process_of(server).pid
        assert left
    eventually(lambda: not any(psutil.pid_exists(process.pid) for process in left))
    assert not list(Path("/sys/fs/cgroup").glob(f"**/turntrace-sandbox-{pid}-*"))


def test_a_session_that_nobody_waited_for_is_ended() -> None:
    """Its client is gone and nobody knows its id: it would hold a place until it idles out."""
    for server in running_server():
        url = httpx.URL(server.url())
        for _ in range(5):
            with socket.create_connection((url.host, url.port or 0)) as asking:
                asking.sendall(
                    b"POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
                )
        time.sleep(1)  # time enough for all of them to start
        eventually(lambda: not programs_of(server))  # noqa: B023 - there is one server


def test_sessions_do_not_end_at_the_open_files_that_a_shell_allows() -> None:
    """Each costs the server seven descriptors: with the usual 1,024, 150 sessions were all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        for server in running_server():
            assert process_of(server).rlimit(psutil.RLIMIT_NOFILE)[0] == (
                hard if 0 < hard < 65_536 else 65_536
            )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_session_stands_still_however_late_its_orders_are_heard(
    server: EmbeddedServer, session: Session
) -> None:
    """On a busy machine init may sleep through a call: pause, resume and pause come at once."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(session.run, "import time; print(1, flush=True); time.sleep(1)")
        eventually(lambda: [each.status() for each in programs_of(server)].count("sleeping") == 2)
        init = next(each for each in programs_of(server) if each.children())
        init.suspend()
        first.result()
    assert session.printed("x = 5; print(2)") == "2\n"
    init.resume()
    (program,) = init.children()
    eventually(lambda: program.status() == "stopped")
    assert session.printed("print(x)") == "5\n"
    eventually(lambda: program.status() == "stopped")
