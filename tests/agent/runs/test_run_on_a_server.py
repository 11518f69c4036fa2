"""`turntrace run` against a server in this process: one that changes, refuses, reports nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from starlette.responses import Response

from agent.commands.run_work import RunRequest, run_request
from agent.config.config import load_config
from agent.errors import EngineStartError
from agent.runs.ending import DONE, INCOMPLETE
from agent.runs.session import KeptSession
from conversations.errors import RunFolderError
from conversations.run.store import UNFINISHED, read_manifest, read_trajectories
from tests.agent.native_api import Server, in_a_thread, status
from tests.agent.native_server import behaviour
from tests.helpers import hermes_template

TASKS = 6


@pytest.fixture
def server() -> Iterator[Server]:
    with in_a_thread(Server(behaviour(hermes_template(), 0.02))) as running:
        yield running


@dataclass(frozen=True)
class Ran:
    code: int
    said: str


Go = Callable[..., Ran]


@pytest.fixture
def go(server: Server, tmp_path: Path) -> Go:
    """A run of the command into tmp_path/run, resumed where there is one."""
    rows = [{"id": f"t{number}", "prompt": f"q:{number}"} for number in range(TASKS)]
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "looking.py").write_text(
        'def look(question: str) -> str:\n    """Looks it up."""\n    return "about"\n',
        encoding="utf-8",
    )
    (tmp_path / "tools.yaml").write_text("- function: looking:look\n", encoding="utf-8")

    def go(
        *,
        force: bool = False,
        stop_after_s: float | None = None,
        name: str = "run",
        temperature: float = 1.0,
        response_length: int = 512,
        workers: int | None = None,
        session: KeptSession | None = None,
    ) -> Ran:
        sets = [
            "model_path=smollm2-base",
            f"rollout.temperature={temperature}",
            f"rollout.response_length={response_length}",
            "rollout.name=sglang_server",
            f"rollout.server.urls=[{server.url}]",
            "rollout.prompt_length=1024",
            f"rollout.multi_turn={{enable: true, tool_config_path: {tmp_path / 'tools.yaml'}}}",
        ]
        out, console = tmp_path / name, Console(file=io.StringIO(), width=1000)
        resume = (out / "run.json").exists()
        request = RunRequest(
            tmp_path / "tasks.jsonl",
            out,
            load_config(None, sets),
            None,
            resume,
            force,
            False,
            ["run"],
            stop_after_s,
            workers=workers,
            session=session,
        )
        return Ran(run_request(request, console), console.file.getvalue())  # type: ignore[attr-defined]

    return go


def test_a_resume_finds_the_model_of_the_first_start(
    go: Go, server: Server, tmp_path: Path
) -> None:
    assert go(stop_after_s=0.0).code == INCOMPLETE
    before = read_manifest(tmp_path / "run")
    assert before["served"] == {"model_path": "/models/m", "weight_version": "default"}
    server.model, server.weights = "/models/other", "step-2"
    says = "model_path was /models/m, is /models/other; weight_version was default, is step-2"
    with pytest.raises(RunFolderError, match=says):
        go()
    assert read_manifest(tmp_path / "run") == before
    assert go(force=True).code == DONE
    assert read_manifest(tmp_path / "run")["served"] == {
        "model_path": "/models/other",
        "weight_version": "step-2",
    }


def test_runs_that_keep_a_session_share_its_engine_and_sample_each_in_its_own_way(
    go: Go, server: Server, tmp_path: Path
) -> None:
    kept, said = KeptSession(), []
    with kept:
        assert kept.seed is None
        for temperature in (0.0, 0.7):
            ran = go(name=f"T{temperature:g}", temperature=temperature, session=kept)
            assert ran.code == DONE
            said.append("starting" in ran.said)
            config = read_manifest(tmp_path / f"T{temperature:g}")["config"]
            assert config["rollout"]["temperature"] == temperature
        assert kept.seed == 0
        with pytest.raises(ValueError, match="one config"):
            go(name="longer", response_length=7, session=kept)
        with pytest.raises(ValueError, match="workers"):
            go(name="workers", workers=1, session=kept)
    assert said == [True, False]
    asked = [body["sampling_params"]["temperature"] for body in server.bodies]
    assert asked == [0.0] * (len(asked) // 2) + [0.7] * (len(asked) // 2)
    assert len(asked) > 2 * TASKS
    assert kept.seed is None


def test_a_server_that_does_not_say_what_it_serves_is_noted(
    go: Go, server: Server, tmp_path: Path
) -> None:
    assert go(stop_after_s=0.0).code == INCOMPLETE
    server.says["/get_server_info"] = Response(status_code=404)
    ran = go()
    assert ran.code == DONE
    assert ran.said.count("note: the server does not report its model") == 1
    assert read_manifest(tmp_path / "run")["served"]["model_path"] == "/models/m"


def test_a_resume_whose_server_is_away_leaves_the_run_as_it_was(
    go: Go, server: Server, tmp_path: Path
) -> None:
    go(stop_after_s=0.0)
    before = read_manifest(tmp_path / "run")
    server.up = False
    with pytest.raises(EngineStartError, match=r"/health: .*503"):
        go()
    assert read_manifest(tmp_path / "run") == before


@pytest.mark.parametrize("stop_after_s", [0.0, 0.05, 0.25, 0.45])
def test_stopped_and_gone_on_with_every_conversation_is_whole(
    go: Go, server: Server, tmp_path: Path, stop_after_s: float
) -> None:
    server.behaviours = [behaviour(hermes_template(), 0.2)]
    assert go(stop_after_s=stop_after_s).code == INCOMPLETE
    assert go(stop_after_s=0.0).code == INCOMPLETE  # before any of them stands again
    server.behaviours = [behaviour(hermes_template(), 0.0)]
    assert go().code == DONE
    records = list(read_trajectories(tmp_path / "run"))
    assert sorted(record.task_id for record in records) == [f"t{number}" for number in range(TASKS)]
    assert {(record.stop_reason, record.num_turns, record.infra_error) for record in records} == {
        ("stop", 4, False)
    }
    assert (tmp_path / "run" / UNFINISHED).read_bytes() == b""


def test_a_refusal_of_every_turn_is_a_failure_of_infrastructure(
    go: Go, server: Server, tmp_path: Path
) -> None:
    server.behaviours = [status(403, "key revoked")]
    ran = go()
    assert ran.code == INCOMPLETE
    assert f"{TASKS} conversations failed because of infrastructure" in ran.said
    assert {len(server.bodies)} == {TASKS}  # each turn is sent once
    server.behaviours = [behaviour(hermes_template(), 0.0)]
    assert go().code == DONE
