"""`run --agent`: a program for each (task, sample), what it gets, how it ends, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.commands.agent_work import run_all
from agent.commands.rescore_work import load_score
from agent.errors import AgentError, TaskError
from agent.gateway import programs
from agent.gateway.boxed import boxed_command, installation
from agent.gateway.programs import (
    MAX_ARGUMENT_BYTES,
    MAX_OUTPUT_BYTES,
    AgentCommand,
    ProgramRunner,
    folder_name,
    prompt_of,
)
from agent.loop.tasks import Task, read_tasks
from agent.workers.programs import Programs, WorkerGateway, write_program
from conversations.run.store import read_trajectories
from conversations.trajectory import Trajectory
from tests.agent.gateway.live import Obedient, checked, gateway_config_of, live
from tests.helpers import ROOT

AGENT = Path(__file__).parent / "clients" / "small_agent.py"
COMMAND = f"{shlex.quote(sys.executable)} {shlex.quote(str(AGENT))} {{prompt}}"


def run_rows(
    out: Path,
    prompts: list[str],
    *,
    n: int = 1,
    box: tuple[Path, ...] | None = None,
    **options: Any,
) -> dict[str, Trajectory]:
    """Runs the small agent for each prompt, and checks the run."""
    tasks = out.parent / "tasks.jsonl"
    tasks.write_text(
        "".join(json.dumps({"id": str(i), "prompt": p}) + "\n" for i, p in enumerate(prompts))
    )
    config = gateway_config_of(n=n)
    with live(
        out, engine=Obedient(), config=config, tasks=tasks, resume=options.pop("resume", False)
    ) as gateway:
        wrap = None
        if box is not None:
            gateway.listen_on_socket()
            wrap = functools.partial(boxed_command, gateway, box)
        runner = ProgramRunner(gateway, AgentCommand.of(COMMAND), wrap=wrap, **options)
        missing = (
            (task, sample)
            for task in read_tasks(tasks)
            for sample in range(n)
            if (task.id, sample) not in gateway.folder.done
        )
        gateway.session_loop.run(run_all(runner, missing, config))
    checked(out)
    return {record.id: record for record in read_trajectories(out)}


def kept(record: Trajectory) -> Path:
    return Path(record.extra["session"]["folder"])


def test_each_sample_is_a_program_in_a_folder_of_its_own(tmp_path: Path) -> None:
    def score(record: Trajectory) -> Mapping[str, float]:
        return {"exit": float(record.extra["session"]["exit_code"] == 0)}

    odd = 'files:it\'s $(touch /tmp/x) `id` "q" \n{prompt} \0 é'
    records = run_rows(tmp_path / "run", [odd, "noisy:y"], n=2, score=score)
    assert sorted(records) == ["0-0", "0-1", "1-0", "1-1"]
    for record in (records["0-0"], records["0-1"]):
        assert (record.reward, record.num_turns, record.stop_reason) == (1.0, 1, "stop")
        said = odd.partition(":")[2].replace("\0", "\ufffd")
        assert (kept(record) / "files/deep/er/note.txt").read_text() == said
        assert "left []" in (kept(record) / "stdout.txt").read_text()
        about = json.loads((kept(record) / "program.json").read_text())
        assert (about["exit_code"], about["left_out"]) == (0, ["big"])
        assert not (kept(record) / "files/link").exists()
    noisy = records["1-0"]
    assert (noisy.reward, noisy.extra["session"]["exit_code"]) == (0.0, 7)
    assert (kept(noisy) / "stdout.txt").stat().st_size == MAX_OUTPUT_BYTES


def test_a_program_that_never_asks_or_never_ends(tmp_path: Path) -> None:
    records = run_rows(
        tmp_path / "run", ["silent:", "hang:x"], deadline_s=3.0, score=lambda record: {"r": 1.0}
    )
    silent, hangs = records["0-0"], records["1-0"]
    assert (silent.infra_error, silent.reward) == (True, None)
    assert "exit code 3" in str(silent.error)
    assert (hangs.stop_reason, hangs.infra_error, hangs.reward) == ("deadline", False, 1.0)
    assert hangs.extra["session"]["exit_code"] == -signal.SIGTERM


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ZeroDivisionError('no tests ran')", "no tests ran"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return {'a': 1.7e308, 'b': 1.7e308}", "the sum of the parts is inf"),
    ],
)
def test_a_reward_function_that_fails_is_no_reward(tmp_path: Path, body: str, says: str) -> None:
    """Its own row has none; the others are run and rewarded."""
    file = tmp_path / "score.py"
    file.write_text(
        f"def score(record):\n    if record.task_id == '0':\n        {body}\n    return 1.0\n"
    )
    score = load_score(f"{file}:score", tmp_path)
    records = run_rows(tmp_path / "run", ["x:y", "x:z"], score=score)
    failed = records["0-0"]
    assert (failed.reward, failed.infra_error) == (None, True)
    assert says in str(failed.error)
    assert records["1-0"].reward == 1.0


def test_a_resume_runs_what_is_missing(tmp_path: Path) -> None:
    first = run_rows(tmp_path / "run", ["x:one", "silent:"])
    again = run_rows(tmp_path / "run", ["x:one", "silent:"], resume=True)
    assert first["0-0"].to_line() == again["0-0"].to_line()
    assert first["1-0"].started_at != again["1-0"].started_at


def test_ctrl_c_kills_the_program_and_keeps_its_session(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        runner = ProgramRunner(gateway, AgentCommand.of(COMMAND))
        task = next(read_tasks(_file(tmp_path / "t.jsonl", {"id": "t", "prompt": "hang:x"})))

        def poll() -> None:
            if gateway.progress.turns_so_far:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gateway.session_loop.run(runner.run(task, 0), poll=poll)
    assert (tmp_path / "unfinished.jsonl").read_text().count("\n") == 1
    left = subprocess.run(["pgrep", "-f", f"{AGENT} hang:x"], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_program_that_is_cut_off_while_it_is_scored_keeps_its_turns(tmp_path: Path) -> None:
    """In a worker, whose session is nobody's to close."""
    is_scored, may_end = threading.Event(), threading.Event()

    def score(record: Trajectory) -> Mapping[str, float]:
        is_scored.set()
        may_end.wait(30)
        return {"r": 1.0}

    def poll() -> None:
        if is_scored.is_set():
            raise KeyboardInterrupt

    with live(tmp_path / "run", engine=Obedient()) as gateway:
        ran = Programs(AgentCommand.of(COMMAND), tmp_path / "run", lambda: score)
        worker = WorkerGateway(gateway.session_loop, ran)
        worker.start()
        try:
            task = Task("t", [{"role": "user", "content": "x:y"}])
            with pytest.raises(KeyboardInterrupt):
                gateway.session_loop.run(worker.run_program(task, 0), poll=poll)
            line, _ = worker.take(task, 0)
            assert worker.live == []
        finally:
            may_end.set()
            worker.close()
    record = Trajectory.from_line(str(line))
    assert (record.num_turns, record.stop_reason, record.reward) == (1, "cancelled", None)


def test_files_of_a_worker_that_cannot_be_written_are_left_out(tmp_path: Path) -> None:
    about = json.dumps({"exit_code": 0, "left_out": ["big"]}).encode()
    files = (("files/note.txt", b"n"), (f"files/{'x' * 300}", b"x"), ("program.json", about))
    write_program(tmp_path, "t-0", files)
    folder = tmp_path / "programs" / "t-0"
    assert (folder / "files/note.txt").read_bytes() == b"n"
    told = json.loads((folder / "program.json").read_text())
    assert told == {"exit_code": 0, "left_out": ["big", "x" * 300]}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "programs").touch()
    with pytest.raises(OSError, match="programs"):  # the run tells it, and goes on
        write_program(tmp_path / "full", "t-0", files)


def _file(file: Path, row: Any) -> Path:
    file.write_text(json.dumps(row) + "\n")
    return file


def test_a_text_that_is_no_argument_is_told_by_task(tmp_path: Path) -> None:
    given = AgentCommand.of("true --task={prompt}")
    assert given.argv("a\0b\ud800c")[1] == "--task=a\ufffdb\ufffdc"
    longest = "x" * (MAX_ARGUMENT_BYTES - len("--task="))
    assert subprocess.run(given.argv(longest), check=True).returncode == 0
    with pytest.raises(OSError, match="too long"):
        subprocess.run([*given.argv(longest)[:1], f"x{given.argv(longest)[1]}"], check=True)
    with pytest.raises(TaskError, match=f"{MAX_ARGUMENT_BYTES + 1} bytes"):
        given.argv(f"{longest}x")


def test_a_task_with_half_characters_is_run(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "\\ud800", "prompt": "x:\\ud800y"}\n')
    (task,) = read_tasks(tasks)
    with live(tmp_path / "run", engine=Obedient()) as gateway:
        runner = ProgramRunner(gateway, AgentCommand.of(COMMAND))
        gateway.session_loop.run(runner.run(task, 0))
    record = checked(tmp_path / "run").only
    assert (record.infra_error, record.num_turns > 0) == (False, True), record.error


@pytest.mark.parametrize(
    ("command", "problem"),
    [("mini -t hello", "no {prompt}"), ("nothing-there {prompt}", "no program"), ("'x", "quot")],
)
def test_a_command_that_cannot_be_run_is_one_line(command: str, problem: str) -> None:
    with pytest.raises(AgentError, match=problem):
        AgentCommand.of(command)


def test_names_of_folders_are_safe() -> None:
    assert folder_name("../../etc/passwd-0") == "%2E.%2F..%2Fetc%2Fpasswd-0"
    assert "/" not in folder_name("a/b")
    assert len(folder_name("é" * 500)) < 255
    odd = [
        ".a-0",
        "a-0",
        "..a-0",
        "%2Ea-0",
        ".-0",
        "..-0",
        "-0",
        "\ud800-0",
        "\ud801-0",
        "\ufffd-0",
    ]
    assert len({*map(folder_name, odd)}) == len(odd)
    assert not [name for name in map(folder_name, odd) if name.startswith(".")]


def test_a_prompt_is_the_text_of_a_task() -> None:
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompt_of(Task("t", said)) == "a\n\nb"
    with pytest.raises(TaskError, match=r"'t'.*images"):
        prompt_of(Task("t", [{"role": "user", "content": [{"type": "image", "image": 0}]}]))


def test_a_program_that_leaves_a_process_with_its_pipes_ends(tmp_path: Path) -> None:
    record = run_rows(tmp_path / "run", ["leaves:x"])["0-0"]
    assert record.extra["session"]["exit_code"] == 0
    assert record.extra["session"]["wall_s"] < 15
    assert not (kept(record) / "files/pipe").exists()


def test_a_folder_that_cannot_be_made_fails_its_sample_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied(folder: Path) -> None:
        if folder.name == "0-0":
            raise OSError(errno.ENOSPC, "no space")
        folder.mkdir(parents=True)

    monkeypatch.setattr(programs, "_emptied", emptied)
    records = run_rows(tmp_path / "run", ["x:one", "x:two"])
    assert (records["0-0"].infra_error, records["1-0"].infra_error) == (True, False)
    assert "no space" in str(records["0-0"].error)


def test_a_process_that_is_killed_leaves_no_program(tmp_path: Path) -> None:
    for name in ("gone", "stays"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "note.txt").touch()
        (tmp_path / name / "deep").chmod(0o500)
    script = """
import os, signal, subprocess, sys
from keeper import Keeper
keeper = Keeper()
for folder in sys.argv[1:]:
    keeper.made(folder)
keeper.removed(sys.argv[2])
for ends in (True, False):
    program = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keeper.began(program.pid)
    if ends:
        keeper.ended(program.pid)
    print(program.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    started = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "gone", tmp_path / "stays"],
        cwd=ROOT / "agent/gateway",
        capture_output=True,
    )
    ended, running = map(int, started.stdout.split())
    until = time.monotonic() + 30
    while groups_processes(running) or (tmp_path / "gone").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert (tmp_path / "stays/deep/note.txt").exists()
    assert len(groups_processes(ended)) == 2  # it was said to have ended
    os.killpg(ended, signal.SIGKILL)


def groups_processes(group: int) -> list[int]:
    """The processes of a group that run, zombies left out."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(file.parent.name))
    return found


def test_output_that_cannot_be_written_is_read_on() -> None:
    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "no space")

    async def copied() -> bool:
        stream = asyncio.StreamReader()
        stream.feed_data(b"x" * 200_000)
        stream.feed_eof()
        await programs._copy(stream, Full())
        return stream.at_eof()

    assert asyncio.run(copied())


def test_an_environment_has_no_key_but_the_sessions(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        session = asyncio.run(gateway.open("t"))
        environment = session.env({"ANTHROPIC_AUTH_TOKEN": "mine", "HOME": "/h"})
        asyncio.run(session.finish())
    assert "ANTHROPIC_AUTH_TOKEN" not in environment
    assert (environment["ANTHROPIC_API_KEY"], environment["HOME"]) == (session.api_key, "/h")


def test_an_isolated_program_reaches_the_gateway_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "s")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        record = run_rows(tmp_path / "run", [f"look:{port}"], box=(AGENT,))["0-0"]
    assert record.extra["session"]["exit_code"] == 0, (kept(record) / "stderr.txt").read_text()
    assert json.loads((kept(record) / "files/found.json").read_text()) == {
        "gateway": True,
        "other port": False,
        "home": False,
        "secret": None,
        "work": "/tmp/work",
    }
    assert record.num_turns == 1


def test_an_installation_is_what_a_program_needs(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    (environment / "bin" / "mini").touch()
    assert installation(environment / "bin" / "mini") == environment
    script = tmp_path / "lib/node_modules/codex/node_modules/x/bin.js"
    script.parent.mkdir(parents=True)
    script.touch()
    (tmp_path / "codex").symlink_to(script)
    assert installation(tmp_path / "codex") == tmp_path / "lib/node_modules"
    assert installation(tmp_path / "tasks.jsonl") == tmp_path / "tasks.jsonl"
