"""`turntrace run --workers`: the same records as without, whoever dies, each one once.

One Ray serves the whole file, and one pool of two workers most of its tests: a worker takes
seconds to start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.responses import JSONResponse, Response

from agent.commands.agent_work import AgentOptions, run_agents
from agent.commands.run_work import RunRequest, run_request
from agent.config.config import Config, load_config
from agent.engines.engine import Engine
from agent.errors import AgentError
from agent.loop.batch import Progress, run_tasks
from agent.loop.tasks import Task, read_tasks
from agent.runs.parts import Parts, config_tools, prepare
from agent.runs.session import Session
from agent.workers import cluster as ray_cluster
from agent.workers.actor import Desk, Worker
from agent.workers.pool import WorkerPool
from agent.workers.wire import Kind, Setup, Work, decode_work, encode_work, sent_record
from conversations.images.sources import image_source
from conversations.run.open_run import open_run
from conversations.run.store import (
    RUN,
    SUPERSEDED,
    TRAJECTORIES,
    UNFINISHED,
    RunFolder,
    read_manifest,
    read_trajectories,
)
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.agent.native_api import Server, in_a_thread
from tests.agent.native_server import sampled
from tests.agent.workers.project import write_project
from tests.helpers import ROOT, hermes_template

QUESTIONS = 24
TURNS = 3
LIGHT = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
"""Workers on the scripted engine need a tokenizer and no torch, which takes seconds to import."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of one node, as an administrator starts it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    fresh = {**LIGHT, **ray_cluster.QUIET}
    before = {name: os.environ.get(name) for name in fresh}
    os.environ.update(fresh)
    node = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20}
    started = Cluster(initialize_head=True, head_node_args=node)
    yield started.address
    started.shutdown()  # type: ignore[no-untyped-call]
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    questions = [f"question {index}" for index in range(QUESTIONS)]
    folder = tmp_path_factory.mktemp("project") / "p"
    return write_project(folder, [*questions, "a deadly one"], turns=TURNS)


@pytest.fixture(scope="module")
def parts(project: Path) -> Iterator[Parts]:
    sys.path.append(str(project))
    config = load_config(project / "config.yaml")
    yield prepare(config, config_tools(config))
    sys.path.remove(str(project))


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the pool has told the user."""
    return []


@pytest.fixture(scope="module")
def pool(address: str, parts: Parts, said: list[str]) -> Iterator[WorkerPool]:
    with WorkerPool(parts, 2, address, say=said.append) as started:
        yield started


@pytest.fixture(scope="module")
def alone(parts: Parts, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harmless tasks, run without workers."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with RunFolder.create(folder, {}) as store, Session(parts) as session:
        session.run(run_tasks(harmless(project), session.runtime, store=store))
    return folder


@pytest.fixture
def nap(project: Path) -> Iterator[Any]:
    """Makes the tool take so many seconds, but for the first four questions."""
    file = project / "nap_s"
    yield lambda seconds: file.write_text(str(seconds))
    file.unlink(missing_ok=True)


def harmless(project: Path) -> list[Task]:
    return list(read_tasks(project / "tasks.jsonl", QUESTIONS))


def in_workers(pool: WorkerPool, tasks: list[Task], store: RunFolder, **options: Any) -> Any:
    """The coroutine that runs the tasks in the pool."""
    make = pool.making(store.unfinished)
    arguments = {"make": make, "converse": pool.converse, "store": store, "max_concurrent": 16}
    return run_tasks(tasks, pool.runtime, **{**arguments, **options})


def content(folder: Path) -> dict[str, dict[str, Any]]:
    """What records say, without what no two runs share: times, and the id of nothing."""
    records = {}
    for record in read_trajectories(folder):
        assert record.id not in records
        fields = dataclasses.asdict(record)
        for name in ("started_at", "wall_s"):
            del fields[name]
        for call in fields["tool_calls"]:
            for name in ("queue_s", "run_s", "attempts"):
                del call[name]
        records[record.id] = fields
    return records


def pids(project: Path) -> set[int]:
    """The processes that the tool has run in, but for this one."""
    found = {int(file.name) for file in (project / "pids").iterdir()}
    return {pid for pid in found if pid != os.getpid() and Path(f"/proc/{pid}").exists()}


async def until(condition: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


# ---------------------------------------------------------------------- whoever dies


def test_the_same_records_as_without_workers(
    pool: WorkerPool, project: Path, alone: Path, tmp_path: Path
) -> None:
    progress = Progress()
    with RunFolder.create(tmp_path / "run", {}) as store:
        pool.run(in_workers(pool, harmless(project), store, progress=progress))
    assert content(tmp_path / "run") == content(alone)
    assert (progress.done, progress.turns) == (QUESTIONS, QUESTIONS * TURNS)
    assert len(pids(project)) == 2  # both had a share


def test_workers_that_die_lose_nothing_and_what_kills_them_is_found(
    pool: WorkerPool, project: Path, alone: Path, tmp_path: Path, said: list[str], nap: Any
) -> None:
    """One is killed from outside, and a tool ends its process whenever it is called."""
    nap(0.05)
    tasks = list(read_tasks(project / "tasks.jsonl"))
    said.clear()

    async def disturbed(store: RunFolder, progress: Progress) -> None:
        running = asyncio.ensure_future(in_workers(pool, tasks, store, progress=progress))
        await until(lambda: progress.done >= 3)
        for pid in list(pids(project))[:1]:
            os.kill(pid, signal.SIGKILL)
        await running

    progress = Progress()
    with RunFolder.create(tmp_path / "run", {}) as store:
        pool.run(disturbed(store, progress))
    found = content(tmp_path / "run")
    deadly = found.pop(f"t{QUESTIONS}-0")
    assert found == content(alone)
    assert (deadly["stop_reason"], deadly["infra_error"]) == ("engine_error", True)
    assert "its worker died" in deadly["error"]
    assert len(said) >= 4
    assert all(line.startswith("note: worker ") and "\n" not in line for line in said)


# ---------------------------------------------------------------------- cut off, resumed


def test_what_is_cut_off_is_kept_and_continued(
    pool: WorkerPool, project: Path, alone: Path, tmp_path: Path, nap: Any
) -> None:
    """As after Ctrl-C and `--stop-after`: both cancel the run."""
    nap(0.3)
    folder, progress = tmp_path / "run", Progress()

    async def cut(store: RunFolder) -> None:
        running = asyncio.ensure_future(
            in_workers(pool, harmless(project), store, progress=progress, max_concurrent=4)
        )
        await until(lambda: progress.done >= 4 and progress.running == 4)
        await asyncio.sleep(0.35)  # into a second turn
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    with RunFolder.create(folder, {}) as store:
        pool.run(cut(store))
    unfinished = list(read_trajectories(folder / UNFINISHED))
    done = list(read_trajectories(folder))
    assert len(unfinished) == 4
    assert {record.stop_reason for record in unfinished} == {"cancelled"}
    assert not {record.id for record in unfinished} & {record.id for record in done}

    nap(0)
    with RunFolder.resume(folder, {}) as store:
        pool.run(in_workers(pool, harmless(project), store))
    again = content(folder)
    assert again.keys() == content(alone).keys()
    resumed = [one for one in again.values() if one["warnings"]]
    assert {warning["kind"] for one in resumed for warning in one["warnings"]} == {"resumed"}
    assert [one["response_ids"] for _, one in sorted(again.items())] == [
        one["response_ids"] for _, one in sorted(content(alone).items())
    ]


def test_over_sampling_cuts_off_the_slow_rest(
    pool: WorkerPool, project: Path, tmp_path: Path, nap: Any
) -> None:
    nap(30)  # but the first four
    with RunFolder.create(tmp_path / "run", {}) as store:
        pool.run(in_workers(pool, harmless(project), store, target=4, max_concurrent=8))
    cut = list(read_trajectories(tmp_path / "run" / UNFINISHED))
    done = list(read_trajectories(tmp_path / "run"))
    assert {record.id for record in done} == {f"t{index}-0" for index in range(4)}
    assert len({record.id for record in cut}) == len(cut) >= 4
    assert {warning.kind for record in cut for warning in record.warnings} == {"over_sampled"}


def test_what_a_worker_warns_of_is_in_the_record(pool: WorkerPool, tmp_path: Path) -> None:
    row = Task("t", [{"role": "user", "content": "q:x"}], interaction_kwargs={"name": "nobody"})
    with RunFolder.create(tmp_path / "run", {}) as store:
        pool.run(in_workers(pool, [row], store))
    [record] = read_trajectories(tmp_path / "run")
    assert [warning.kind for warning in record.warnings] == ["no_interactions"]


# ---------------------------------------------------------------------- the command


def request(project: Path, out: Path, **more: Any) -> RunRequest:
    options = {
        "config": load_config(project / "config.yaml", ["rollout.max_num_seqs=4"]),
        "limit": 4,
        "resume": False,
        "force": False,
        "validate": False,
        "argv": ["run"],
    }
    tasks = more.pop("tasks", project / "tasks.jsonl")
    return RunRequest(tasks, out, **{**options, **more})


def test_ctrl_c_and_kill_of_the_run_itself_lose_nothing(
    address: str, project: Path, tmp_path: Path, nap: Any
) -> None:
    """Killed, then interrupted, then resumed without workers."""
    nap(0.4)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "agent", "run", "tasks.jsonl", "--config", "config.yaml"]
    command += ["--out", str(out), "--workers", "1", "--ray", address, "--limit", str(QUESTIONS)]
    command += ["--set", "rollout.max_num_seqs=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **LIGHT}

    def start(*more: str, kill: signal.Signals, at: int) -> tuple[int, str]:
        process = subprocess.Popen(
            [*command, *more],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = out / TRAJECTORIES
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if lines.exists() and lines.read_bytes().count(b"\n") >= at:
                break
            time.sleep(0.02)
        os.killpg(process.pid, kill)  # as a terminal does it, to the whole group
        return process.wait(60), process.communicate()[0]

    code, _ = start(kill=signal.SIGKILL, at=2)
    assert code == -signal.SIGKILL
    kept = len(list(read_trajectories(out)))
    code, text = start("--resume", kill=signal.SIGINT, at=kept + 4)
    assert code == 130, text
    assert text.splitlines()[-1].startswith("interrupted: ")
    assert "(raylet)" not in text
    assert read_manifest(out)["workers"] == 1
    done = len(list(read_trajectories(out)))
    assert 0 < len(list(read_trajectories(out / UNFINISHED))) <= 4
    assert done < QUESTIONS

    nap(0)
    rest = request(project, out, limit=QUESTIONS, resume=True)
    assert run_request(rest, Console(file=(tmp_path / "said").open("w"))) == 0
    assert len(content(out)) == QUESTIONS
    assert (out / SUPERSEDED).exists()
    assert read_manifest(out)["workers"] is None
    assert verify_run(out).defects == 0


async def likeliest_too(server: Server, body: dict[str, Any]) -> Response:
    """A server's answer, with the two likeliest tokens of each place, as SGLang writes it."""
    ids = sampled(hermes_template(), body["input_ids"])
    meta = {
        "finish_reason": {"type": "stop"},
        "prompt_tokens": len(body["input_ids"]),
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "output_top_logprobs": [[[-0.5, token, None], [-1.5, 1, None]] for token in ids],
    }
    return JSONResponse({"output_ids": ids, "meta_info": meta})


def test_a_run_on_a_server_with_evidence_of_each_token(
    address: str, project: Path, tmp_path: Path
) -> None:
    with in_a_thread(Server(likeliest_too)) as server:
        config = load_config(
            project / "config.yaml",
            [
                "rollout.name=sglang_server",
                f"rollout.server.urls=[{server.url}]",
                "rollout.turntrace={evidence: {top_logprobs: 2}}",
            ],
        )
        asked = request(project, tmp_path / "run", config=config, workers=1, ray=address)
        console = Console(file=(said := io.StringIO()))
        assert run_request(asked, console) == 0, said.getvalue()
    opened = open_run(tmp_path / "run")
    for record in opened:
        assert opened.evidence(record.id)["top_ids"].shape == (sum(record.response_mask), 2)
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["counts"]["done"], manifest["workers"]) == (4, 1)
    assert manifest["served"]
    assert verify_run(tmp_path / "run").defects == 0


READS_A_FILE = """
from pathlib import Path

def score(record):
    return len((Path(record.extra["session"]["folder"]) / "files/deep/note.txt").read_text())
"""


def test_programs_in_workers_leave_what_they_leave_without(
    address: str, project: Path, tmp_path: Path
) -> None:
    """One program kills its worker: the other there is ended, and both are run again."""
    rows = ["plain:a", f"linger:{tmp_path}/linger", f"kill:{tmp_path}/kill"]
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text("".join(json.dumps({"id": row[:4], "prompt": row}) + "\n" for row in rows))
    program = Path(__file__).parent / "agent_program.py"
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {{prompt}}"
    reward = tmp_path / "reward.py"
    reward.write_text(READS_A_FILE)

    def run(**more: Any) -> str:
        console = Console(file=(said := io.StringIO()), width=1000)
        asked = request(project, out, tasks=tasks, config=config, limit=None, **more)
        assert run_agents(asked, AgentOptions(command, f"{reward}:score"), console) == 0, (
            said.getvalue()
        )
        return said.getvalue()

    with in_a_thread(Server(likeliest_too)) as server:
        settings = ["rollout.name=sglang_server", f"rollout.server.urls=[{server.url}]"]
        config = load_config(project / "config.yaml", settings)
        said = run(workers=1, ray=address)
        assert said.count(" died (") == 1
        assert read_manifest(out)["workers"] == 1
        assert "nothing to do" in run(workers=1, ray=address, resume=True)
        run(resume=True)  # without workers: the same run
    for pid in (tmp_path / "linger").read_text().split():
        assert not Path(f"/proc/{pid}").exists() or zombie(int(pid))
    records = {record.id: record for record in read_trajectories(out)}
    assert sorted(records) == ["kill-0", "ling-0", "plai-0"]
    for record in records.values():
        session = record.extra["session"]
        kept = Path(session["folder"])
        assert (record.num_turns, session["exit_code"]) == (1, 0)
        assert kept.parent == out / "programs"
        assert record.reward == len(record.messages[0]["content"].partition(":")[2])
        _, _, note = record.messages[0]["content"].partition(":")
        assert (kept / "files/deep/note.txt").read_text() == note
        assert (kept / "stdout.txt").read_text() == "stop\n"
        assert json.loads((kept / "program.json").read_text())["exit_code"] == 0
    assert verify_run(out).defects == 0


def zombie(pid: int) -> bool:
    """Whether it ended, and its parent has not looked."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_worker_that_cannot_start_is_one_line(address: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "tools.yaml").write_text("- function: nowhere:look\n")
    nowhere = f"rollout.multi_turn.tool_config_path={tmp_path / 'tools.yaml'}"
    config = load_config(parts.config.path, [nowhere])
    with pytest.raises(AgentError, match=r"worker 0 .*nowhere"):
        WorkerPool(dataclasses.replace(parts, config=config), 1, address)
    with pytest.raises(AgentError, match=r"--workers 40: .*--workers 4"):
        WorkerPool(parts, 40, address)
    with pytest.raises(AgentError, match="ray://"):
        WorkerPool(parts, 1, "ray://localhost:10001")


@pytest.mark.parametrize("wrong", ["127.0.0.1:1", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_without_a_ray_is_one_line(wrong: str, parts: Parts) -> None:
    with pytest.raises(AgentError, match=f"--ray {wrong}: ") as caught:
        WorkerPool(parts, 1, wrong)
    assert "\n" not in str(caught.value)


def test_what_listens_at_the_address_and_is_no_ray_is_one_line(parts: Parts) -> None:
    """Ray itself would try for minutes, whatever is there."""
    with in_a_thread(Server(likeliest_too)) as server:
        address = server.url.removeprefix("http://")
        with pytest.raises(AgentError, match=f"--ray {address}: .*not Ray") as caught:
            WorkerPool(parts, 1, address)
    assert "\n" not in str(caught.value)


def test_programs_whose_workers_do_not_start_leave_no_run(project: Path, tmp_path: Path) -> None:
    """Neither does a run without programs: the right command must not be refused then."""
    asked = request(project, tmp_path / "run", workers=1, ray="127.0.0.1:1")
    for _ in range(2):
        with pytest.raises(AgentError, match="--ray"):
            run_agents(asked, AgentOptions("true {prompt}"), Console(file=io.StringIO()))
        assert not (tmp_path / "run" / RUN).exists()


def test_a_mount_that_is_not_there_is_told_before_anything_starts(
    project: Path, tmp_path: Path
) -> None:
    options = AgentOptions("true {prompt}", isolated=True, mounts=(tmp_path / "nowhere",))
    for more in ({}, {"workers": 1, "ray": "127.0.0.1:1"}):
        asked = request(project, tmp_path / "run", **more)
        with pytest.raises(AgentError, match=r"--agent-mount .*nowhere"):
            run_agents(asked, options, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


class RefusingPrograms:
    """Programs of a worker whose machine lacks something that the run's has."""

    live = ()

    async def run_program(self, task: Task, sample: int) -> None:
        raise AgentError("--agent-mount /nowhere: is not there")


async def test_a_users_mistake_that_a_worker_finds_is_told_as_it_is() -> None:
    programs: Any = RefusingPrograms()
    runtime: Any = types.SimpleNamespace(engine=None)
    desk = Desk(runtime, programs)
    await desk.begin([(1, encode_work(Work(Task("t", []), 0)))])
    [(number, kind, text, *_)] = (await desk.take()).answers
    assert (number, kind) == (1, Kind.REFUSED)
    assert text.decode() == "--agent-mount /nowhere: is not there"


def lacks_a_package(config: Config, log: Path | None) -> Engine:
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


async def test_a_worker_that_lacks_a_package_says_how_to_get_it(
    parts: Parts, tmp_path: Path
) -> None:
    setup = Setup(parts.config, 0, False, tmp_path / "nowhere", (), start=lacks_a_package)
    error = json.loads(await Worker().start(setup))["error"]
    assert "'torch' is not installed" in error
    assert "pip install" in error


# ---------------------------------------------------------------------- what goes over


def test_a_workers_line_is_written_as_it_came(alone: Path) -> None:
    record: Trajectory = next(read_trajectories(alone))
    for truth in (2**70, "\ud800", 0.1 + 0.2, {"b": 1, "a": "é"}):
        line = dataclasses.replace(record, ground_truth=truth).to_line()
        sent = sent_record(line)
        assert sent.to_line() == line
        assert (sent.id, sent.turns, sent.tool_calls) == (
            record.id,
            record.turns,
            record.tool_calls,
        )


def test_a_task_and_a_record_come_back_as_they_went(alone: Path) -> None:
    record: Trajectory = next(read_trajectories(alone))
    task = Task(
        "é\ud800",
        [{"role": "user", "content": "\u2028 🙂"}],
        {"look": {"create_kwargs": {"b": 1, "a": [None, 0.1]}}},
        ground_truth={"x": 2**70},
        data_source="s",
        extra={"z": 1, "a": {"y": [], "b": {}}},
        interaction_kwargs={"name": "n"},
        images=(image_source("data:;base64,aGk="), image_source("sha256:" + 64 * "a")),
    )
    there = decode_work(encode_work(Work(task, 3, record)))
    assert [(one.url, one.sha256) for one in there.task.images] == [
        (one.url, one.sha256) for one in task.images
    ]
    bare, sent = (dataclasses.replace(one, images=()) for one in (task, there.task))
    assert (sent, there.sample) == (bare, 3)
    assert json.dumps(dataclasses.asdict(sent)) == json.dumps(dataclasses.asdict(bare))
    assert there.before is not None
    assert there.before.to_line() == record.to_line()
