"""`turntrace verify --engine`: a table, a file beside the run, exit codes 0, 1 and 2."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from conversations.run.open_run import open_run
from conversations.run.scores import SCORES, SavedScores
from tests.agent.native_api import Server, in_a_thread, waits
from tests.agent.scoring.toy_model import ToyModel, changed, sampled_run
from tests.command import turntrace
from tests.helpers import ROOT


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "agent", "verify", *map(str, arguments)]


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return turntrace("verify", *arguments)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled_run(tmp_path_factory.mktemp("sampled") / "run", ToyModel(), temperature=0.7)


@pytest.fixture
def run(sampled: Path, tmp_path: Path) -> Path:
    return changed(tmp_path / "run", sampled, lambda number, record: record)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    async def behaviour(server: Server, body: dict[str, Any]) -> Response:
        return await model.serve(server, body)

    model = ToyModel(seed=getattr(request, "param", 1))
    with in_a_thread(Server(behaviour)) as started:
        started.model = "/models/toy"
        yield started


def test_a_server_that_gives_the_same_log_probs(run: Path, server: Server) -> None:
    done = verify(run, "--engine", server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["records", "scored", "12"] for line in lines)
    assert lines[-1].startswith("the engine gives the recorded log-probs")
    assert len(lines) < 25
    assert len(server.bodies) == 12
    assert all(body["top_logprobs_num"] > 1 for body in server.bodies)  # the temperature is 0.7
    saved = SavedScores(run)
    assert all(saved.differences(record) for record in open_run(run).records())
    again = verify(run)
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize("server", [2], indirect=True)
def test_a_server_with_other_weights(run: Path, server: Server) -> None:
    done = verify(run, "--engine", server.url, "--json")
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["ok"], summary["scores"]["ok"]) == (True, False)
    assert summary["scores"]["worst"][0]["id"] in open_run(run)


async def _nothing(server: Server, body: dict[str, Any]) -> Response:
    meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-1.0, 5, None]]}
    return JSONResponse({"output_ids": [5], "meta_info": meta})


def test_a_server_that_does_not_score_is_no_success(run: Path) -> None:
    with in_a_thread(Server(_nothing)) as server:
        server.model = "/models/toy"
        done = verify(run, "--engine", server.url)
    assert done.returncode == 1
    assert "did not score" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ["missing.yaml", "http://127.0.0.1:1", "http://"])
def test_an_engine_that_is_not_there_is_one_line(run: Path, engine: str) -> None:
    done = verify(run, "--engine", engine)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / SCORES).exists()


@pytest.mark.parametrize("text", [None, "model_path: [", "model_path: m\nrollout: {nn: 1}\n"])
def test_a_mistake_in_the_config_is_told_before_the_run_is_read(
    run: Path, tmp_path: Path, text: str | None
) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    done = verify(run, "--engine", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line[:6] for line in done.stderr.splitlines()] == ["error:"]
    assert str(config) in done.stderr


def test_an_address_without_http_is_told_how_a_server_is_given(run: Path) -> None:
    done = verify(run, "--engine", "127.0.0.1:30000")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: --engine 127.0.0.1:30000: ")
    assert "http://" in error


@pytest.mark.parametrize("options", [("--bound", "1"), ("--engine", "x.yaml", "--bound", "inf")])
def test_a_bound_that_cannot_work_is_one_line(run: Path, options: tuple[str, ...]) -> None:
    done = verify(run, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --bound")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_aborts_the_requests_and_leaves_the_earlier_scores(
    run: Path, number: signal.Signals
) -> None:
    (run / SCORES).write_text("earlier\n")
    with in_a_thread(Server(waits)) as server:
        server.model = "/models/toy"
        process = subprocess.Popen(
            command(run, "--engine", server.url),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(server.bodies) < 12 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert {body["rid"] for body in server.bodies} == set(server.aborted)
    assert process.returncode not in (0, 1)
    assert "Traceback" not in errors
    assert (run / SCORES).read_text() == "earlier\n"


def test_the_toy_server_speaks_as_sglang_does() -> None:
    """Its first place has no log-prob, as SGLang's."""
    model = ToyModel()
    body = {"input_ids": [1, 2, 3], "logprob_start_len": 0, "top_logprobs_num": 1}
    answer = asyncio.run(model.serve(Server(waits), body))
    meta = json.loads(bytes(answer.body))["meta_info"]
    assert [triple[0] is None for triple in meta["input_token_logprobs"]] == [True, False, False]
