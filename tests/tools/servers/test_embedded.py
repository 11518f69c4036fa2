"""Rule: an embedded server starts on use, is shared, and stops with its last user or parent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import psutil
import pytest

from tests.tools.servers.sandbox.processes import eventually
from tools.base import SandboxUnavailable
from tools.registry import load_tools
from tools.servers import embedded
from tools.servers.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[3]


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def printed(server: EmbeddedServer) -> str:
    answer = httpx.post(
        f"{server.url()}/run_code", json={"code": "print(2)", "language": "python"}, timeout=60
    )
    return str(answer.json()["run_result"]["stdout"])


async def test_a_tool_set_starts_it_once_and_stops_it() -> None:
    before = children()
    first, second = load_tools("sandbox"), load_tools("gsm8k")
    for tools in (first, second):
        await tools.start()
    (server,) = children() - before
    await first.close()
    assert (await second["code_interpreter"].tool.execute("t", {"code": "print(1)"}))[
        0
    ].text == "1\n"
    await second.close()
    await second.close()
    assert not server.is_running()


def test_one_that_never_says_where_it_is_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(embedded, "START_S", 0.5)
    before = children()
    with pytest.raises(SandboxUnavailable, match=r"^silent [^\n]*0\.5 s$"):
        EmbeddedServer("silent").check()
    assert children() == before


async def test_nobody_needs_to_start_it() -> None:
    before = children()
    tools = load_tools("sandbox")
    assert (await tools["code_interpreter"].tool.execute("t", {"code": "print(1)"}))[
        0
    ].text == "1\n"
    await tools.close()
    assert children() == before


def test_a_dead_server_is_started_again_and_the_last_user_stops_it() -> None:
    before = children()
    server = EmbeddedServer("tools.servers.sandbox")
    server.acquire()
    server.acquire()
    first = server.url()
    (child,) = children() - before
    child.kill()
    eventually(lambda: not server.is_running)
    assert printed(server) == "2\n"
    assert server.url() != first
    server.release()
    assert server.is_running
    server.release()
    assert not server.is_running
    assert children() == before


def test_killing_the_parent_leaves_no_process() -> None:
    code = """
        import httpx
        from tools.servers.embedded import sandbox
        sandbox.acquire()
        print(sandbox.url(), flush=True)
        body = {"code": "import time; time.sleep(50)", "language": "python", "run_timeout": 50}
        httpx.post(sandbox.url() + "/run_code", json=body, timeout=60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE
    )
    family = psutil.Process(parent.pid)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith(b"http")
        idle = len(family.children(recursive=True))
        eventually(
            lambda: len(family.children(recursive=True)) >= idle + 2
        )  # The program, and the init of its sandbox.
        started = family.children(recursive=True)
    finally:
        parent.kill()
        parent.communicate()
    eventually(lambda: all(is_gone(process) for process in started))


def test_a_parent_that_just_ends_leaves_no_process_either() -> None:
    code = """
        import psutil
        from tools.servers.embedded import sandbox
        sandbox.acquire()
        sandbox.url()
        print(*[child.pid for child in psutil.Process().children()])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.split()) == 1
    assert not psutil.pid_exists(int(done.stdout))


def test_a_tools_folder_of_the_users_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise SystemExit('the wrong tools')")
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tools.servers.embedded import sandbox
        sandbox.acquire()
        print(sandbox.url())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("http://127.0.0.1:")


def test_a_server_that_does_not_start_is_told_in_one_line() -> None:
    before = children()
    with pytest.raises(SandboxUnavailable, match=r"^tools\.servers\.no_such_server [^\n]*code 1$"):
        EmbeddedServer("tools.servers.no_such_server").check()
    EmbeddedServer("tools.servers.sandbox").check()
    assert children() == before
