"""Rule: without a zygote each program has a bubblewrap, with the same answers and limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.tools.servers.sandbox.attacks import ATTACKS
from tests.tools.servers.sandbox.processes import eventually, programs_of, running_server
from tools.servers.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    yield from running_server("--cold")


@pytest.fixture(scope="module")
def warm() -> Iterator[EmbeddedServer]:
    yield from running_server()


def run(server: EmbeddedServer, code: str, **body: Any) -> dict[str, Any]:
    body = {"code": code, "language": "python", **body}
    return httpx.post(f"{server.url()}/run_code", json=body, timeout=90).json()  # type: ignore[no-any-return]


def test_it_says_that_it_is_cold(server: EmbeddedServer) -> None:
    assert httpx.get(f"{server.url()}/v1/info").json()["start"] == "cold"


# What an interpreter of its own does, a fork of the zygote must do, too.
SAME = {
    "flags": (
        "import sys; print(sys.flags, sys.argv, sys.path[0], __file__, "
        "__spec__, __doc__, __package__, sys.stdout.encoding, "
        "sys.stdin.seekable(), sys.stdout.seekable(), sys.stdout.isatty())"
    ),
    "environment": (
        "import os; print({k: v for k, v in sorted(os.environ.items()) if k "
        "not in ('_', 'SHLVL', 'OLDPWD')}, os.umask(0), os.getcwd())"
    ),
    "identity": (
        "import os; print(os.getuid(), os.getgid(), os.getgroups(), "
        "oct(os.stat('/tmp').st_mode), os.listdir('/tmp'), "
        "os.listdir('/dev/shm'), sorted(os.listdir('/dev')), "
        "sorted(os.listdir('/')))"
    ),
    "limits": (
        "import resource as r; print([r.getrlimit(x) for x in (r.RLIMIT_AS, "
        "r.RLIMIT_CPU, r.RLIMIT_NOFILE, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, "
        "r.RLIMIT_CORE, r.RLIMIT_DATA, r.RLIMIT_STACK)])"
    ),
    "signals": (
        "import signal; print([(s.name, signal.getsignal(s)) for s in "
        "signal.Signals if s not in (9, 19)], signal.pthread_sigmask(0, []))"
    ),
    "signals of a child": (
        "import subprocess; print(subprocess.run(['grep', '^Sig[BI]', "
        "'/proc/self/status'], capture_output=True).stdout)"
    ),
    "descriptors": (
        "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:3], "
        "len(os.listdir('/proc/self/fd')))"
    ),
    "an object's end": (
        "class A:\n"
        "    def __del__(self): print('gone', NAME, helper())\n"
        "def helper(): return 'help'\n"
        "NAME = 'a'\n"
        "a = A()\n"
        "b = [a]; b.append(b)"
    ),
    "order at the end": (
        "import atexit, threading, time\n"
        "atexit.register(print, 'first in, last out'); atexit.register(print, "
        "'exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), "
        "print('thread'))).start()\n"
        "print('main')"
    ),
    "a daemon thread": (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('main')"
    ),
    "a pool at the end": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "p = ThreadPoolExecutor()\n"
        "p.submit(lambda: __import__('time').sleep(0.1) or print('done'))"
    ),
    "an exception": (
        "def f():\n"
        "    return g()\n"
        "def g():\n"
        "    raise ValueError('x') from KeyError('y')\n"
        "f()"
    ),
    "a group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "a syntax error": "x = (\nprint(1)",
    "an indentation error": "def f():\nreturn 1",
    "exits": "raise SystemExit('said')",
    "exit with a number": "import sys; sys.exit(300)",
    "an exit in a thread": (
        "import sys, threading\n"
        "t = threading.Thread(target=sys.exit, args=(3,)); t.start(); "
        "t.join(); print('on')"
    ),
    "an exception in a thread": (
        "import threading\n"
        "t = threading.Thread(target=lambda: 1 / 0, name='t'); t.start(); "
        "t.join(); print('on')"
    ),
    "a hook": "import sys\nsys.excepthook = lambda *a: print('hooked', a[0])\n1 / 0",
    "warnings": "import warnings; warnings.warn('careful')",
    "pickled from main": (
        "import pickle\n"
        "class A: pass\n"
        "print(type(pickle.loads(pickle.dumps(A()))).__module__)"
    ),
    "a module imports main": (
        "import sys; sys.modules['__main__'].x = 5; import __main__; "
        "print(__main__.x, x)"
    ),
    "spawned": (
        "import multiprocessing as m\n"
        "def f(x): return x * 2\n"
        "if __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(1) as p: print(p.map(f, [1, 2]))"
    ),
    "inspected": "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))",
    "closed output": "import os; print('x'); os.close(1)",
    "a broken pipe": (
        "import subprocess; print(subprocess.run('yes | head -1; echo "
        "${PIPESTATUS[@]}', shell=True, executable='/bin/bash', "
        "capture_output=True).stdout)"
    ),
    "random": (
        "import random, uuid; print(len({random.random() for _ in range(9)}), "
        "uuid.uuid4() != uuid.uuid4())"
    ),
    "input": "print(input(), input('? '), list(__import__('sys').stdin))",
    "cached": "import helper; print(helper.__cached__)",
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_warm_program_is_as_a_cold_one(
    server: EmbeddedServer, warm: EmbeddedServer, name: str
) -> None:
    given = {
        "stdin": "one\ntwo\nthree\nfour",
        "files": {"helper.py": ""},
        "memory_limit_MB": 512,
        "run_timeout": 30,
    }
    cold_run, warm_run = (
        run(each, SAME[name], **given)["run_result"] | {"execution_time": 0}
        for each in (server, warm)
    )
    assert warm_run == cold_run


def test_what_was_not_flushed_is_in_the_files(server: EmbeddedServer, warm: EmbeddedServer) -> None:
    code = (
        "f = open('global', 'w'); f.write('g')\n"
        "def main():\n"
        "    f = open('local', 'w'); f.write('l')\n"
        "    return f\n"
        "kept = [main()]\n"
        "kept.append(kept)\n"
        "1 / 0"
    )
    cold_files, warm_files = (
        run(each, code, fetch_files=["global", "local"])["files"] for each in (server, warm)
    )
    assert warm_files == cold_files == {"global": "Zw==", "local": "bA=="}


def test_two_programs_draw_different_numbers(warm: EmbeddedServer) -> None:
    code = "import random, tempfile, uuid; print(random.random(), tempfile.mktemp(), uuid.uuid4())"
    assert run(warm, code)["run_result"]["stdout"] != run(warm, code)["run_result"]["stdout"]


def test_an_answer_is_as_the_warm_one(server: EmbeddedServer) -> None:
    code = (
        "import os, sys\n"
        "print(__name__, sys.argv, input(), open('d/a').read(), os.getcwd())\n"
        "open('out', 'w').write('x')\n"
        "sys.exit(3)"
    )
    answer = run(server, code, stdin="in", files={"d/a": "YQ=="}, fetch_files=["out", "none"])
    assert answer["run_result"] | {"execution_time": 0} == {
        "status": "Finished", "execution_time": 0, "return_code": 3,
        "stdout": "__main__ ['/tmp/main.py'] in a /tmp\n", "stderr": "",
    }  # fmt: skip
    assert answer["files"] == {"out": "eA=="}
    assert answer["message"] == "not fetched, for it is no regular file of at most 32 MiB: none"


def test_a_time_limit_ends_all_of_it(server: EmbeddedServer) -> None:
    answer = run(
        server,
        (
            "import os, time\n"
            "print('a', flush=True)\n"
            "os.fork()\n"
            "os.setsid() if os.getpid() % 2 else 0\n"
            "time.sleep(60)"
        ),
        run_timeout=1,
    )
    assert (answer["run_result"]["status"], answer["run_result"]["stdout"]) == (
        "TimeLimitExceeded",
        "a\n",
    )
    eventually(lambda: not programs_of(server))


def test_memory_in_sum_is_bounded(server: EmbeddedServer) -> None:
    code = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0: x = bytearray(60 << 20); time.sleep(5); "
        "os._exit(0)\n"
        "time.sleep(1.5)"
    )
    answer = run(server, code, memory_limit_MB=150, run_timeout=20)
    assert "limit of 150 MiB" in answer["run_result"]["stderr"]
    eventually(lambda: not programs_of(server))


@pytest.mark.parametrize(
    "name",
    [
        "network",
        "kernel doors",
        "rarer kernel doors",
        "rights by a program",
        "the other tables of calls",
    ],
)
def test_an_attack_is_contained(server: EmbeddedServer, name: str) -> None:
    attack = ATTACKS[name]
    code = attack.full.replace("PORT", server.url().rsplit(":", 1)[1])
    ran = run(server, code, run_timeout=40, memory_limit_MB=256)["run_result"]
    assert "ESCAPED" not in ran["stdout"]
    assert "tried" in ran["stdout"]


def test_a_session_is_cold_too(server: EmbeddedServer) -> None:
    with httpx.Client(base_url=server.url(), timeout=60) as client:
        path = f"/v1/sessions/{client.post('/v1/sessions', json={}).json()['id']}"
        printed = [
            client.post(f"{path}/run_code", json={"code": code}).json()["run_result"]["stdout"]
            for code in ("x = 1", "print(x)")
        ]
        assert printed == ["", "1\n"]
        assert client.delete(path).status_code == 204
    eventually(lambda: not programs_of(server))


@pytest.mark.parametrize("way", ["server", "warm"])
async def test_who_hangs_up_at_any_moment_of_a_start_leaves_nothing(
    request: pytest.FixtureRequest, way: str
) -> None:
    server: EmbeddedServer = request.getfixturevalue(way)
    body = {"code": "import time; time.sleep(60)", "language": "python", "run_timeout": 60}
    before = orphans()
    async with httpx.AsyncClient(base_url=server.url()) as client:
        for milliseconds in range(1, 60, 2):
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post(
                    "/run_code", json=body, timeout=httpx.Timeout(30, read=milliseconds / 1000)
                )
        answer = await client.post(
            "/run_code", json={"code": "print('next')", "language": "python"}, timeout=60
        )
    assert answer.json()["run_result"]["stdout"] == "next\n"
    eventually(lambda: not programs_of(server))
    eventually(
        lambda: orphans() <= before
    )  # what stays would stay for a minute; other tests' come and go


def orphans() -> set[int]:
    """Every bubblewrap of a sandbox whose server is gone, or let go of it."""
    return {process.pid for process in psutil.process_iter() if _is_orphan(process)}


def _is_orphan(process: psutil.Process) -> bool:
    try:
        return (
            process.ppid() == 1
            and "/tmp/main.py" in process.cmdline()
            and "bwrap" in process.cmdline()[0]
        )
    except psutil.Error:
        return False
