"""Rules: where there is no zygote, every program has a bubblewrap of its own, with the same answers and the same limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.tools.attacks import ATTACKS
from tests.tools.sandboxes import eventually, programs_of, running_server
from tools.servers.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    yield from running_server("--cold")


def run(server: EmbeddedServer, code: str, **body: Any) -> dict[str, Any]:
    body = {"code": code, "language": "python", **body}
    return httpx.post(f"{server.url()}/run_code", json=body, timeout=90).json()  # type: ignore[no-any-return]


def test_it_says_that_it_is_cold(server: EmbeddedServer) -> None:
    assert httpx.get(f"{server.url()}/v1/info").json()["start"] == "cold"


def test_an_answer_is_as_the_warm_one(server: EmbeddedServer) -> None:
    code = "import os, sys\nprint(__name__, sys.argv, input(), open('d/a').read(), os.getcwd())\nopen('out', 'w').write('x')\nsys.exit(3)"
    answer = run(server, code, stdin="in", files={"d/a": "YQ=="}, fetch_files=["out", "none"])
    assert answer["run_result"] | {"execution_time": 0} == {
        "status": "Finished", "execution_time": 0, "return_code": 3, "stdout": "__main__ ['/tmp/main.py'] in a /tmp\n", "stderr": "",
    }  # fmt: skip
    assert answer["files"] == {"out": "eA=="}
    assert answer["message"] == "not fetched, for it is no regular file of at most 32 MiB: none"


def test_a_time_limit_ends_all_of_it(server: EmbeddedServer) -> None:
    answer = run(
        server, "import os, time\nprint('a', flush=True)\nos.fork()\nos.setsid() if os.getpid() % 2 else 0\ntime.sleep(60)", run_timeout=1
    )
    assert (answer["run_result"]["status"], answer["run_result"]["stdout"]) == ("TimeLimitExceeded", "a\n")
    eventually(lambda: not programs_of(server))


def test_memory_in_sum_is_bounded(server: EmbeddedServer) -> None:
    code = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0: x = bytearray(60 << 20); time.sleep(5); os._exit(0)\ntime.sleep(1.5)"
    )
    answer = run(server, code, memory_limit_MB=150, run_timeout=20)
    assert "reached the limit of 150 MiB" in answer["run_result"]["stderr"]
    eventually(lambda: not programs_of(server))


@pytest.mark.parametrize("name", ["network", "kernel doors", "rarer kernel doors", "rights by a program", "the other tables of calls"])
def test_an_attack_is_contained(server: EmbeddedServer, name: str) -> None:
    attack = ATTACKS[name]
    code = attack.full.replace("PORT", server.url().rsplit(":", 1)[1])
    ran = run(server, code, run_timeout=40, memory_limit_MB=256)["run_result"]
    assert "ESCAPED" not in ran["stdout"]
    assert "tried" in ran["stdout"]


def test_a_session_is_cold_too(server: EmbeddedServer) -> None:
    with httpx.Client(base_url=server.url(), timeout=60) as client:
        path = f"/v1/sessions/{client.post('/v1/sessions', json={}).json()['id']}"
        printed = [client.post(f"{path}/run_code", json={"code": code}).json()["run_result"]["stdout"] for code in ("x = 1", "print(x)")]
        assert printed == ["", "1\n"]
        assert client.delete(path).status_code == 204
    eventually(lambda: not programs_of(server))
