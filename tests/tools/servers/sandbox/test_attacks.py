"""Rule: every attack is contained and leaves nothing; honest programs get their right answers.

All of it over HTTP, on one real server: a few attacks at a time, and eight honest clients without a
pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tools.servers.sandbox.attacks import ATTACKS, KILLED, Attack
from tests.tools.servers.sandbox.processes import (
    eventually,
    process_of,
    programs_of,
    running_server,
)
from tools.servers.embedded import EmbeddedServer

HONEST_CLIENTS = 8
ATTACKERS = 4
SECRET = "honest" + "-secret-"  # In every honest program: no attack may find it in its memory.
MAX_GROWTH_BYTES = 24 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    yield from running_server("--workers", "6")


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user that programs run as, outside of the sandbox."""
    identity: dict[str, Any] = (
        {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    process = subprocess.Popen(["/bin/sleep", "600"], cwd="/", **identity)
    yield process
    process.kill()
    process.wait()


def honest(number: int) -> tuple[dict[str, Any], str]:
    """An honest request and its right answer: the kinds in turn, with a number of its own."""
    long = f"{number}" * 300_000
    kinds: list[tuple[str, str, str]] = [
        (f"print({number} ** 2)", "", f"{number**2}"),
        ((
            f"import subprocess; print(subprocess.check_output(['sh', '-c', 'echo "
            f"$(({number} + 1))']).decode(), end='')"
        ), "", f"{number + 1}"),
        ((
            f"from concurrent.futures import ThreadPoolExecutor as P; "
            f"print(sum(P(8).map(lambda x: x * {number}, range(9))))"
        ), "", f"{36 * number}"),
        ((
            f"import asyncio\n"
            f"async def f(): await asyncio.sleep(0.01); return {number}\n"
            f"print(asyncio.run(f()))"
        ), "", f"{number}"),
        ((
            f"import multiprocessing as m\n"
            f"def f(x): return x + {number}\n"
            f"with m.Pool(2) as p: print(*p.map(f, [1, 2]))"
        ), "", f"{number + 1} {number + 2}"),
        ((
            f"import socket; a, b = socket.socketpair(); a.send(b'{number}'); "
            f"print(b.recv(99).decode())"
        ), "", f"{number}"),
        ((
            "import hashlib, sys; "
            "print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
        ), long, hashlib.sha256(long.encode()).hexdigest()),
        (f"print('{number}' * 300_000)", "", long),
    ]  # fmt: skip
    code, stdin, answer = kinds[number % len(kinds)]
    return {
        "code": f"{code}  # {SECRET}{number}",
        "language": "python",
        "stdin": stdin,
        "run_timeout": 60,
        "memory_limit_MB": 512,
    }, answer


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/run_code", json={"language": "python", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


async def be_honest(
    client: httpx.AsyncClient, numbers: Iterator[int], stop: asyncio.Event
) -> list[str]:
    """Sends requests until `stop`. Returns what was wrong; the last entry counts the right ones."""
    wrong, right = [], 0
    while not stop.is_set():
        request, answer = honest(next(numbers))
        run = (await ask(client, **request))["run_result"]
        if (run["stdout"], run["stderr"], run["return_code"]) == (f"{answer}\n", "", 0):
            right += 1
        else:
            wrong.append(f"{request['code'][:200]}: {str(run)[:500]}")
    return [*wrong, f"{right} right"]


async def attack(
    client: httpx.AsyncClient, attack: Attack, turn: asyncio.Semaphore, **names: Any
) -> list[str]:
    """What was not contained."""
    code = attack.full
    for name, value in names.items():
        code = code.replace(name, str(value))
    timeout_s = (
        2 if KILLED in attack.ends else 40
    )  # What ends by itself may take its time on a busy machine.
    async with turn:
        answer = await ask(
            client,
            code=code,
            run_timeout=timeout_s,
            memory_limit_MB=256,
            fetch_files=["fetched", "fetched2", "fetched3", "fetched4"],
        )
    run, wrong = answer["run_result"], []
    if run is None or run["status"] not in attack.ends or answer["status"] == "SandboxError":
        return [f"ended as {str(answer)[:500]}"]
    if "ESCAPED" in run["stdout"] or answer["files"]:
        wrong.append(f"escaped: {run['stdout'][:500]} {str(answer['files'])[:200]}")
    if attack.attempts and "tried" not in run["stdout"]:
        wrong.append(f"did not get to its end: {run['stdout'][:300]} {run['stderr'][-500:]}")
    if attack.exit_code is not None and run["return_code"] != attack.exit_code:
        wrong.append(f"exit code {run['return_code']}: {run['stderr'][-300:]}")
    if len(run["stdout"]) > 4 << 20 or len(run["stderr"]) > (4 << 20) + 200:
        wrong.append("was not cut")
    return wrong


async def everything(server: EmbeddedServer, victim: int) -> tuple[dict[str, list[str]], list[str]]:
    """What was wrong, by attack, and with the honest."""
    numbers, stop, turn = itertools.count(1), asyncio.Event(), asyncio.Semaphore(ATTACKERS)
    names = {"PORT": server.url().rsplit(":", 1)[1], "VICTIM": victim, "NAME": "turntrace-escape"}
    async with httpx.AsyncClient(
        base_url=server.url(), timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:
        clients = [
            asyncio.create_task(be_honest(client, numbers, stop)) for _ in range(HONEST_CLIENTS)
        ]
        attacks = await asyncio.gather(
            *(attack(client, each, turn, **names) for each in ATTACKS.values())
        )
        stop.set()
        answers = [line for lines in await asyncio.gather(*clients) for line in lines]
    return {name: wrong for name, wrong in zip(ATTACKS, attacks, strict=True) if wrong}, answers


def connections(server: EmbeddedServer) -> list[Any]:
    """Those that the server has not closed yet; its side of one outlives the client's."""
    return [
        each
        for each in process_of(server).net_connections("tcp")
        if each.status != psutil.CONN_LISTEN
    ]


def standing(server: EmbeddedServer) -> dict[str, Any]:
    """What must be the same before and after."""
    process = process_of(server)
    zygotes = [
        child
        for child in process.children(recursive=True)
        if child.cmdline()[1:2] == ["/opt/zygote.py"]
    ]
    return {
        "processes": sorted(child.pid for child in process.children(recursive=True)),
        "descriptors": process.num_fds(),
        "descriptors of the zygote": [zygote.num_fds() for zygote in zygotes],
        "memory of the zygote": [zygote.memory_info().rss >> 20 for zygote in zygotes],
        "mounts": [
            len(Path(f"/proc/{child.pid}/mountinfo").read_text().splitlines())
            for child in (process, *zygotes)
        ],
        "mounts of the machine": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "groups": [
            str(folder)
            for folder in Path("/sys/fs/cgroup").glob(f"**/turntrace-sandbox-{process.pid}-*")
        ],
    }


def written_outside() -> list[str]:
    return [
        folder
        for folder in ("/", "/usr/bin", "/dev", "/tmp", "/dev/shm")
        if os.path.exists(f"{folder}/turntrace-escape")
    ]


async def test_every_attack_is_contained_beside_honest_programs_and_nothing_of_it_stays(
    server: EmbeddedServer, victim: subprocess.Popen[bytes]
) -> None:
    async with httpx.AsyncClient(base_url=server.url(), timeout=60) as client:
        await asyncio.gather(
            *(ask(client, code="while True: print('x' * 100000)") for _ in range(6)),
            *(ask(client, **honest(n)[0]) for n in range(16)),
        )
    eventually(lambda: not programs_of(server) and not connections(server))
    before, memory = standing(server), process_of(server).memory_info().rss

    wrong, answers = await everything(server, victim.pid)

    assert not wrong, "\n".join(
        f"{name}: {line}" for name, lines in wrong.items() for line in lines
    )
    assert all(answer.endswith(" right") and int(answer.split()[0]) > 0 for answer in answers), (
        answers
    )
    assert victim.poll() is None
    assert not written_outside()
    with contextlib.suppress(AssertionError):
        eventually(lambda: standing(server) == before)
    assert standing(server) == before
    assert process_of(server).memory_info().rss - memory < MAX_GROWTH_BYTES
    assert psutil.Process(victim.pid).status() != psutil.STATUS_ZOMBIE


REQUESTS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "a zero byte": ({"code": "print(1)\0"}, "Failed", ""),
    "half of a pair": ({"code": "print('\\ud83d')"}, "Failed", ""),
    "1 MB of code": ({"code": "x = 1\n" * 160_000, "run_timeout": 60}, "Success", ""),
    "nothing": ({"code": ""}, "Success", ""),
    "names that fight": ({"code": "print(1)", "files": {"a": "", "a/b": ""}}, "SandboxError", None),
    "many files": (
        {"code": "print(1)", "files": {f"{number}/x": "" for number in range(3000)}},
        "Success",
        "1\n",
    ),
    "its own main": ({"code": "print(1)", "files": {"main.py": "cHJpbnQoMik="}}, "Success", "1\n"),
    "its own json": (
        {"code": "import json; print(json.x)", "files": {"json.py": "eCA9IDE="}},
        "Success",
        "1\n",
    ),
    "a name too long": ({"code": "print(1)", "files": {"x" * 300: ""}}, "SandboxError", None),
    "hardly any memory": ({"code": "print(1)", "memory_limit_MB": 1}, "Success", "1\n"),
    "all the memory": ({"code": "print(1)", "memory_limit_MB": 10**15}, "Success", "1\n"),
    "hardly any time": ({"code": "print(1)", "run_timeout": 1e-9}, "Failed", ""),
    "all the time": ({"code": "print(1)", "run_timeout": 1e300}, "Success", "1\n"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_odd_request_is_answered_and_the_next_one_too(server: EmbeddedServer, name: str) -> None:
    body, status, printed = REQUESTS[name]
    answer = httpx.post(f"{server.url()}/run_code", json={"language": "python", **body}, timeout=60)
    assert (answer.status_code, answer.json()["status"]) == (200, status), answer.text
    assert printed is None or answer.json()["run_result"]["stdout"] == printed
    answer = httpx.post(
        f"{server.url()}/run_code", json={"language": "python", "code": "print('next')"}, timeout=60
    )
    assert answer.json()["run_result"]["stdout"] == "next\n"
