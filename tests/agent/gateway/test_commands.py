"""`turntrace gateway` and `turntrace run --agent` from the command line, over a server."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from agent.cli import main
from conversations.run.store import read_manifest
from tests.agent.gateway.live import checked
from tests.agent.gateway.test_programs import COMMAND
from tests.agent.native_api import Server, answers, free_port, in_a_thread


def turntrace(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["turntrace", *words])
    try:
        return main()
    except SystemExit as ended:
        return int(ended.code or 0)


def config_words(server: Server) -> list[str]:
    settings = {"name": "sglang_server", "server.urls": f"[{server.url}]", "response_length": 4096}
    return [word for key, value in settings.items() for word in ("--set", f"rollout.{key}={value}")]


def in_background(url: str, end: bool) -> threading.Thread:
    """A program that opens a session, has a turn, perhaps ends it, and then Ctrl-C."""

    def use() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(retries=0), timeout=30) as client:
            for _ in range(600):
                try:
                    opened = client.post(f"{url}/sessions", json={"task_id": "t"}).json()
                    break
                except httpx.TransportError:
                    threading.Event().wait(0.1)
            key = {"authorization": f"Bearer {opened['api_key']}"}
            body = {"messages": [{"role": "user", "content": "hello"}]}
            client.post(f"{url}/v1/chat/completions", json=body, headers=key).raise_for_status()
            if end:
                client.post(f"{url}/sessions/{opened['id']}/finish", json={}).raise_for_status()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=use)
    thread.start()
    return thread


@pytest.mark.parametrize("end", [True, False])
def test_the_gateway_serves_until_ctrl_c(
    end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, port = tmp_path / "run", free_port()
    with in_a_thread(Server(answers)) as server:
        thread = in_background(f"http://127.0.0.1:{port}", end)
        code = turntrace(
            *(monkeypatch, "gateway", "--out", str(out), "--port", str(port)),
            *("--set", "rollout.n=2", *config_words(server)),
        )
        thread.join()
    said, notes = (" ".join(text.split()) for text in capfd.readouterr())
    assert notes.count("no effect: rollout.n: ") == 1
    assert f"listening on http://127.0.0.1:{port}" in said
    assert said.count("turntrace.max_tokens") == 1
    assert code == (0 if end else 1)
    assert ("--resume" in said) != end
    assert read_manifest(out)["gateway"] is True
    if end:
        assert checked(out).only.num_turns == 1
    else:
        assert (out / "unfinished.jsonl").read_text().count("\n") == 1


def test_run_agent_ends_in_a_run_like_every_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    rows: list[Any] = [{"id": "a", "prompt": "x:one"}, {"id": "b", "prompt": "x:two"}]
    tasks.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    score = tmp_path / "score.py"
    score.write_text(
        "def score(record):\n    return len(record.turns) + record.extra['session']['exit_code']\n"
    )
    with in_a_thread(Server(answers)) as server:
        words = ["run", str(tasks), "--out", str(out), "--n", "2", "--agent", COMMAND]
        words += ["--reward", f"{score}:score", "--set", "rollout.over_sample_rate=0.5"]
        words += config_words(server)
        assert turntrace(monkeypatch, *words) == 0
        assert capfd.readouterr().err.count("no effect: rollout.over_sample_rate: ") == 1
        assert turntrace(monkeypatch, *words, "--resume") == 0
        other = {COMMAND: f"{COMMAND} more", f"{score}:score": f"{score}:other"}
        score.write_text(f"{score.read_text()}other = score\n")
        for was, now in other.items():
            changed = [now if word == was else word for word in words]
            capfd.readouterr()
            assert turntrace(monkeypatch, *changed, "--resume") == 2
            error = capfd.readouterr().err.splitlines()[-1]
            assert "agent." in error
            assert "--force" in error
        assert turntrace(monkeypatch, *words, "--resume") == 0
    records = checked(out).trajectories
    assert {name: record.reward for name, record in records.items()} == dict.fromkeys(
        ("a-0", "a-1", "b-0", "b-1"), 1.0
    )
    assert "conversations 4 of 4" in " ".join(capfd.readouterr().out.split())


SELF_MADE = """
import json, os, sys, urllib.error, urllib.request
base, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]

def post(path, body):
    asked = urllib.request.Request(base[:-3] + path, json.dumps(body).encode())
    asked.add_header("authorization", "Bearer " + key)
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)

message = {"role": "user", "content": sys.argv[1]}
name = post("/v1/chat/completions", {"messages": [message]})["id"].split("-")[1]
try:
    post("/sessions/" + name + "/finish", {"reward": 1000})
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_a_program_cannot_end_or_reward_its_own_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, out, program = tmp_path / "tasks.jsonl", tmp_path / "run", tmp_path / "program.py"
    tasks.write_text('{"id": "a", "prompt": "x"}\n')
    program.write_text(SELF_MADE)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {{prompt}}"
    with in_a_thread(Server(answers)) as server:
        words = ["run", str(tasks), "--out", str(out), "--agent", command]
        assert turntrace(monkeypatch, *words, *config_words(server)) == 0
    record = checked(out).only
    assert record.reward != 1000
    assert record.extra["session"]["stdout"] == "401\n"


@pytest.mark.parametrize(
    "words",
    [
        ["run", "TASKS", "--out", "OUT", "--reward", "x:y"],
        ["run", "TASKS", "--out", "OUT", "--agent", "no-such-program {prompt}"],
        ["run", "TASKS", "--out", "OUT", "--agent", COMMAND, "--stop-after", "2"],
        ["run", "TASKS", "--out", "OUT", "--agent", COMMAND, "--reward", "no_module:score"],
        ["run", "TASKS", "--out", "OUT", "--agent", COMMAND, "--reward", "score"],
        ["run", "TASKS", "--out", "OUT", "--agent", COMMAND, "--agent-mount", "/"],
        ["gateway", "--out", "OUT", "--workers", "2"],
        ["gateway", "--out", "OUT", "--host", "0.0.0.0"],
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "x"}\n')
    names = {"TASKS": str(tasks), "OUT": str(tmp_path / "run")}
    assert turntrace(monkeypatch, *(names.get(word, word) for word in words)) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_a_task_too_long_for_an_argument_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text(f'{{"prompt": "x"}}\n{{"prompt": "{"x" * (1 << 17)}"}}\n')
    words = ["run", str(tasks), "--out", str(out), "--agent", COMMAND]
    assert turntrace(monkeypatch, *words) == 2
    assert capfd.readouterr().err.startswith(f"error: {tasks}:2: ")
    assert not out.exists()


class Interrupts(Server):
    """Ctrl-C comes while the run asks whether it is there."""

    async def told(self, request: Request) -> Response:
        os.kill(os.getpid(), signal.SIGINT)
        await self.release.wait()
        return await super().told(request)


def test_ctrl_c_before_a_program_ran_promises_no_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text('{"id": "a", "prompt": "x:one"}\n')
    words = ["run", str(tasks), "--out", str(out), "--agent", COMMAND]
    with in_a_thread(Interrupts(answers)) as server:
        assert turntrace(monkeypatch, *words, *config_words(server)) == 130
    said = capfd.readouterr().out
    assert ("interrupted" in said, "--resume" in said) == (True, (out / "run.json").exists())
    with in_a_thread(Server(answers)) as server:
        assert turntrace(monkeypatch, *words, *config_words(server)) == 0
    assert checked(out).only.num_turns == 1
