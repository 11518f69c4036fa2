"""`turntrace view`: a page on disk, or a server for this machine's browser only."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import html
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from agent.commands import view_server as viewer
from conversations.run.open_run import open_run
from conversations.run.store import RUN, TRAJECTORIES
from tests.browser import tab
from tests.command import turntrace
from tests.conversations.pages import changed_run, inflated, parts_of
from tests.conversations.synthetic import make_run
from tests.helpers import child_env

N = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, something that is none, and a link out of it."""
    folder = tmp_path_factory.mktemp("view") / "runs"
    make_run(folder / "one", N)
    changed_run(folder / "two & <b>", folder / "one", lambda number, record: None)
    (folder / "notes").mkdir()
    (folder / "notes" / "secret.txt").write_text("secret", encoding="utf-8")
    return folder


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """`turntrace view FOLDER --serve`; its address."""
    command = [sys.executable, "-m", "agent", "view", str(folder), "--serve", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_env({})
    )
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("http://127.0.0.1:"), process.stderr and process.stderr.read()
        yield said.split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (0, "")


# ---------------------------------------------------------------------- on disk


def test_a_page_is_written_beside_the_run_and_written_again(runs: Path, tmp_path: Path) -> None:
    run = changed_run(tmp_path / "some.run", runs / "one", lambda number, record: None)
    for _ in range(2):
        ran = turntrace("view", "some.run", cwd=tmp_path)
        assert (ran.returncode, ran.stderr) == (0, "")
    page = tmp_path / "some.run.html"
    assert ran.stdout == f"{page}: {N} trajectories, {page.stat().st_size / 1e6:.1f} MB\n"
    assert parts_of(page.read_text(encoding="utf-8"))[0]["columns"]["id"] == list(open_run(run).ids)


def test_a_limit_is_told(runs: Path, tmp_path: Path) -> None:
    ran = turntrace("view", str(runs / "one"), "--out", "page.html", "--limit", "5", cwd=tmp_path)
    assert ran.stdout.startswith("page.html: 5 trajectories")
    assert f"the run has {N}" in ran.stderr


def test_the_parent_is_found_and_another_run_may_be_named(runs: Path, tmp_path: Path) -> None:
    child = changed_run(tmp_path / "child", runs / "one", lambda number, record: None)
    digest = hashlib.sha256((runs / "one" / RUN).read_bytes()).hexdigest()

    def against(parent: dict[str, Any], *options: str) -> tuple[Any, str]:
        manifest = {
            **json.loads((runs / "one" / RUN).read_text(encoding="utf-8")),
            "parent": parent,
        }
        (child / RUN).write_text(json.dumps(manifest), encoding="utf-8")
        ran = turntrace("view", "child", *options, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        return parts_of((tmp_path / "child.html").read_text(encoding="utf-8"))[0]["run"][
            "against"
        ], ran.stderr

    assert against({"path": str(runs / "one"), "run_sha256": digest}) == ("one", "")
    name, note = against({"path": str(runs / "one"), "run_sha256": "0" * 64})
    assert name is None
    assert "--against RUN" in note
    assert against(
        {"path": "/nowhere", "run_sha256": "0" * 64}, "--against", str(runs / "two & <b>")
    ) == ("two & <b>", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "error: none holds no run: there is no run.json"),
        (
            ["run", "--out", "x", "--against", "none"],
            "error: none holds no run: there is no run.json",
        ),
        (
            ["run", "--out", "no/page.html"],
            "error: no/page.html cannot be written: No such file or directory",
        ),
        (["run", "--out", "run"], "error: run cannot be written: Is a directory"),
        (["run"], "run.html exists and is no page of turntrace"),
        (["run", "--port", "0"], "error: --port needs --serve"),
        (["run", "--serve", "--out", "x"], "error: --serve writes no page"),
        (["run", "--serve", "--limit", "3"], "error: --serve writes no page"),
        (
            ["empty", "--serve"],
            "error: empty holds no run: there is no run.json in it, nor one level down",
        ),
        (["none", "--serve"], "error: none cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(runs: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    changed_run(tmp_path / "run", runs / "one", lambda number, record: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.html").write_text("<p>my own notes", encoding="utf-8")
    ran = turntrace("view", *arguments, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == "<p>my own notes"


def test_a_full_disk_is_one_line_and_leaves_no_page(runs: Path, tmp_path: Path) -> None:
    """Files of 4 KiB at most: the page's parts do not fit."""
    command = [
        "sh",
        "-c",
        'ulimit -f 4; exec "$0" -m agent view "$1" --out page.html',
        sys.executable,
        str(runs / "one"),
    ]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env=child_env({}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert ran.stderr.startswith("error: the page cannot be made in ")
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line(runs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = turntrace("view", str(runs), "--serve", "--port", str(port), cwd=tmp_path)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert f"cannot listen on 127.0.0.1:{port}" in ran.stderr


# ---------------------------------------------------------------------- served


def test_runs_are_listed_shown_and_read_block_by_block(runs: Path) -> None:
    with serving(runs) as address, httpx.Client(base_url=address) as client:
        listing = client.get("/").text
        assert "two &amp; &lt;b&gt;" in listing
        assert "notes" not in listing
        for name in ("one", "two%20%26%20%3Cb%3E"):
            assert f'href="/{name}/"' in listing
            page = client.get(f"/{name}/")
            version = page.text.split('data-version="')[1].split('"')[0]
            block = client.get(f"/{name}/blocks/0", params={"v": version})
            assert json.loads(inflated(block.text).split("\n")[0])["id"] == next(
                iter(open_run(runs / "one").ids)
            )
            for answer in (page, block):
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
            assert client.get(f"/{name}/blocks/99", params={"v": version}).status_code == 409
            assert client.get(f"/{name}/blocks/0", params={"v": "0"}).status_code == 409


def test_nothing_else_is_answered(runs: Path) -> None:
    with serving(runs) as address, httpx.Client(base_url=address) as client:
        ways = (
            "/notes/",
            "/../one/",
            "/..%2Fone/",
            "/%2e%2e/",
            "/one%2F..%2Fnotes/",
            "//etc/passwd/",
            "/one/../notes/secret.txt",
            "/%00/",
            "/one/run.json",
        )
        for way in ways:
            answer = _raw(
                address, f"GET {way} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            )
            assert b" 404 " in answer.split(b"\r\n")[0], way
            assert b"secret" not in answer
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert client.request(method, "/one/").status_code == 405


def test_a_name_rebound_to_this_machine_gets_nothing(runs: Path) -> None:
    with serving(runs / "one") as address:
        port = address.rstrip("/").rsplit(":", 1)[1]
        for host in (
            "evil.example",
            f"evil.example:{port}",
            f"127.0.0.1.evil.example:{port}",
            "",
            "[::1]",
            "0.0.0.0",
        ):
            answer = _raw(
                address, f"GET /one/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 400"), host
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert _raw(
                address, f"GET /one/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            ).startswith(b"HTTP/1.1 200"), host
        assert httpx.get(address, follow_redirects=True).url.path == "/one/"


def _raw(address: str, request: str) -> bytes:
    """The answer to a request as it is written, which no client has tidied."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_it_listens_on_this_machine_only(runs: Path) -> None:
    with serving(runs / "one") as address:
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        listening = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        bound = {
            line.split()[1].split(":")[0]
            for line in listening
            if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        }
        assert bound == {"0100007F"}


def test_a_run_that_grows_is_shown_as_it_is_and_earlier_pages_go_on(
    runs: Path, tmp_path: Path
) -> None:
    run = changed_run(tmp_path / "run", runs / "one", lambda number, record: None)
    lines = (run / TRAJECTORIES).read_text(encoding="utf-8").splitlines(keepends=True)
    (run / TRAJECTORIES).write_text("".join(lines[:4]) + lines[4][:50], encoding="utf-8")
    with serving(run) as address, httpx.Client(base_url=address) as client:
        before = client.get("/run/").text
        (run / TRAJECTORIES).write_text("".join(lines), encoding="utf-8")
        after = client.get("/run/").text
        totals = [
            json.loads(inflated(page.split('id="summary">')[1].split("<")[0]))["run"]["total"]
            for page in (before, after)
        ]
        assert totals == [4, N]
        version = before.split('data-version="')[1].split('"')[0]
        assert client.get("/run/blocks/0", params={"v": version}).status_code == 200
        (run / TRAJECTORIES).write_text("{}\n", encoding="utf-8")
        broken = client.get("/run/")
        assert broken.status_code == 500
        assert "trajectories.jsonl:1" in broken.text
        assert len(broken.text.splitlines()) == 1


async def test_a_folder_of_steps_shows_the_steps_and_each_task_step_by_step(
    runs: Path, tmp_path: Path
) -> None:
    root = tmp_path / "training"
    for step in (0, 1):
        changed_run(root / f"step-{step}", runs / "one", lambda number, record: None)
        manifest = root / f"step-{step}" / RUN
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": step}))
    shelf = viewer.PageCache(root)
    transport = httpx.ASGITransport(viewer.make_app(shelf))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            steps = (await client.get("/")).text
            assert "2 steps" in steps
            assert 'href="/steps/runs"' in steps
            assert 'href="/step-1/"' in (await client.get("/steps/runs")).text
            first = next(iter(open_run(runs / "one").records()))
            address = f"/steps/task?{urlencode({'id': first['task_id']})}"
            assert f'href="{html.escape(address)}"' in steps
            page = (await client.get(address)).text
            shown = parts_of(page)[0]["columns"]["id"]
            assert shown[0] == f"step-0/{first['id']}"
            assert {name.partition("/")[0] for name in shown} == {"step-0", "step-1"}
            version = {"v": page.split('data-version="')[1].split('"')[0]}
            block = await client.get("/steps/blocks/0", params=version)
            assert json.loads(inflated(block.text).split("\n")[0])["id"] == shown[0]
            assert (await client.get("/step-0/blocks/0", params=version)).status_code == 409
            other = await client.get("/steps/task", params={"id": "../one"})
            assert (other.status_code, "../one" in other.text) == (500, True)
    finally:
        shelf.close()


async def test_a_folder_of_rounds_leads_to_each_part_of_each_round(
    runs: Path, tmp_path: Path
) -> None:
    for number in (0, 1):
        folder = tmp_path / f"round-{number}" / "held-out"
        changed_run(folder, runs / "one", lambda number, record: None)
        named = {"step": number, "part": "held-out"}
        (folder / RUN).write_text(json.dumps({**json.loads((folder / RUN).read_text()), **named}))
    shelf = viewer.PageCache(tmp_path)
    transport = httpx.ASGITransport(viewer.make_app(shelf))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert "2 steps" in (await client.get("/")).text
            listed = (await client.get("/steps/runs")).text
            address = listed.split('href="/round-1')[1].split('"')[0]
            page = await client.get(f"/round-1{address}")
            assert page.status_code == 200
            assert parts_of(page.text)[0]["columns"]["id"]
    finally:
        shelf.close()


async def test_a_browser_is_told_to_wait_while_a_large_run_is_read(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer, "PATIENCE_S", 0.0)
    shelf = viewer.PageCache(runs)
    try:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(viewer.make_app(shelf)), base_url="http://127.0.0.1"
        ) as client:
            answer = await client.get("/one/")
            assert 'http-equiv="refresh"' in answer.text
            async with asyncio.timeout(60):
                while "data-version" not in answer.text:
                    answer = await client.get("/one/")
            assert parts_of(answer.text)[0]["columns"]["id"] == list(open_run(runs / "one").ids)
    finally:
        shelf.close()


@pytest.mark.asyncio(loop_scope="session")
async def test_a_served_page_works_in_a_browser(browser: Any, runs: Path) -> None:
    with serving(runs) as address:
        async with await browser.new_page() as list_page:
            await list_page.goto(address)
            await list_page.get_by_role("link", name="one").click()
            assert list_page.url.startswith(f"{address}one/")
        async with tab(browser, f"{address}one/") as opened:
            assert (
                await opened.page.evaluate("document.querySelectorAll('[id^=block-]').length") == 0
            )
            await opened.page.keyboard.press("Enter")
            await opened.until("document.querySelector('#detail .message')")
            assert await opened.text("#detail h2") == next(iter(open_run(runs / "one").ids))
            await opened.page.fill("#search", "division by zero")
            assert await opened.page.get_attribute("a.up", "href") == "../"
            await opened.until("document.getElementById('count').textContent.includes(' of ')")
