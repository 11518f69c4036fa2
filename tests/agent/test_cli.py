"""The command line: quick help, one-line errors with exit code 2, and `run`."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent import cli
from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import read_tasks, task_file_hash
from conversations.run.store import RunFolder, read_manifest, read_trajectories
from conversations.verify import verify_run
from tests.command import turntrace
from tests.helpers import (
    ROOT,
    call,
    child_env,
    hermes_template,
)
from tools.function import tool
from tools.toolset import ToolSet

TASKS, QUICK = 6, 2
RUN = ("run", "tasks.jsonl", "--config", "config.yaml")
CONFIG = """
model_path: smollm2-base
rollout:
  name: scripted
  prompt_length: 1024
  multi_turn: {enable: true, tool_config_path: tools.yaml}
  turntrace: {recorded: recorded}
"""
TOOL = '''
import os, pathlib, time
from tools.base import BackendError

def look(question: str) -> str:
    """Looks something up."""
    folder = pathlib.Path(os.environ["LOOK"])
    if (folder / "slow").exists():
        (folder / f"called-{question}").touch()
        time.sleep(0 if question in ("quick 0", "quick 1") else 60)
    if (folder / "down").exists():
        raise BackendError("the backend is down")
    return "found"
'''


OLD_RUN = str(ROOT / "tests" / "conversations" / "turntrace_1")

# ---------------------------------------------------------------------- without an engine


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "verl", "sglang", "ray", "pyarrow", "pydantic", "rich.live"}
    code = f"import sys\nimport agent.cli\nprint({heavy} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert ran.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "none.jsonl", "--out", "run"], "error: none.jsonl: no such task file"),
        (["run", "bad.jsonl", "--out", "run"], "error: bad.jsonl:2: not a JSON object"),
        (
            ["run", "tasks.jsonl", "--out", "run", "--config", "none.yaml"],
            "error: none.yaml: no such config file",
        ),
        (
            ["run", "tasks.jsonl", "--out", "run", "--set", "rollout.nn=1"],
            "error: --set rollout.nn: unknown key; did you mean rollout.n?",
        ),
        (
            ["run", "tasks.jsonl", "--out", "run", "--tools", "gsm9k"],
            "error: 'gsm9k' is not a shipped tool config",
        ),
        (
            ["run", "tasks.jsonl", "--out", "run", "--tools", "./none.yaml"],
            "error: --tools ./none.yaml: no such file",
        ),
        (
            ["run", "tasks.jsonl", "--out", "run", "--tools", "none.yaml"],
            "error: --tools none.yaml: no such file",
        ),
        (
            ["run", "tasks.jsonl", "--out", "run", "--resume", "--set", "model_path=smollm2-base"],
            "error: run holds no run to resume",
        ),
        (["run", "tasks.jsonl", "--out", "run", "--force"], "error: --force: needs --resume"),
        (["gateway", "--out", "run", "--force"], "error: --force: needs --resume"),
        (["replay", "run", "--out", "other", "--force"], "error: --force: needs --resume"),
        (["tasks", "gsm8k", "none.jsonl", "--out", "x.jsonl"], "error: none.jsonl: cannot be read"),
        (
            ["tasks", "gsm_symbolic", "--size", "1", "--out", "tasks.jsonl/x"],
            "error: tasks.jsonl/x cannot be written",
        ),
        (["model", "no/such-model"], "error: model_path: 'no/such-model' is neither"),
        (["verify", "--nope", "run"], "error: turntrace verify: No such option"),
        (["verify"], "see turntrace verify --help"),
        (["verifi"], "error: turntrace: No such command"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{\n', encoding="utf-8")
    ran = turntrace(*arguments, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_since_an_update_is_one_line() -> None:
    arguments = ["turntrace", "tools", "check", "gsm8k"]
    code = (
        f"import sys; sys.modules['jsonschema_rs'] = None; sys.argv = {arguments}; "
        "from agent.cli import main; sys.exit(main())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(
        "error: the Python package 'jsonschema_rs' is not installed; set this environment up"
    )
    assert ran.stderr.count("\n") == 1


def test_a_wrong_option_is_exit_code_2(tmp_path: Path) -> None:
    assert turntrace("run", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("command", [["version"], ["stats", OLD_RUN]], ids=["version", "stats"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(
    unbuffered: str, command: list[str], tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "agent", *command],
            cwd=tmp_path,
            env=child_env({"PYTHONUNBUFFERED": unbuffered}),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == cli.OUTPUT_LOST
    assert ran.stderr.startswith("error: the output cannot be written: ")
    assert len(ran.stderr.splitlines()) == 1


def test_task_files_are_written_and_named(tmp_path: Path) -> None:
    ran = turntrace("tasks", "gsm_symbolic", "--size", "3", "--seed", "5", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "3 tasks written to gsm_symbolic-3-5.jsonl\n")
    assert len(list(read_tasks(tmp_path / "gsm_symbolic-3-5.jsonl"))) == 3


def test_doctor_ends_with_1_where_something_fails(tmp_path: Path) -> None:
    ran = turntrace("doctor", "--set", "rollout.skip_tokenizer_init=false", cwd=tmp_path)
    assert ran.returncode == 1
    assert "fail  config: --set rollout.skip_tokenizer_init: " in ran.stdout


def test_serve_sandbox_serves_until_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent", "serve", "sandbox", "--port", "0", "--workers", "1"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=child_env({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = json.loads(server.stdout.readline())["port"]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/ping").status_code == 200
        taken = turntrace("serve", "sandbox", "--port", str(port), cwd=tmp_path)
        server.terminate()
        assert server.communicate(timeout=30)[1] == ""
    assert server.returncode == 0
    assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
    assert f"error: cannot listen on 127.0.0.1:{port}: " in taken.stderr


# ---------------------------------------------------------------------- runs, on recorded turns


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: tasks, a tool, a config whose engine plays the run in `recorded/`."""
    folder = tmp_path_factory.mktemp("project")
    questions = [
        f"quick {index}" if index < QUICK else f"question {index}" for index in range(TASKS)
    ]
    rows = [
        {"id": f"t{index}", "prompt": f"q:{question}"} for index, question in enumerate(questions)
    ]
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (folder / "looking_up.py").write_text(TOOL, encoding="utf-8")
    (folder / "tools.yaml").write_text(
        "tools:\n  - function: looking_up:look\n    config: {timeout_s: 90}\n", encoding="utf-8"
    )
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    asyncio.run(record(folder))
    return folder


async def record(folder: Path) -> None:
    """Each conversation looks up its question, then says a sentence."""
    template = hermes_template()

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        text = template.decode(prompt_ids)
        question = text.rpartition("<|im_start|>user\nq:")[2].partition("<|im_end|>")[0]
        said = "It was found." if "found" in text else call("look", question=question)
        ids = [*template.encode(said), template.end_id]
        return Generation(ids, [-0.5] * len(ids), "stop")

    @tool
    def look(question: str) -> str:
        """Looks something up."""
        return "found"

    dispatcher = Dispatcher(
        ToolSet.from_tools([look]), max_parallel_calls=1, shorten=lambda text: None
    )
    runtime = Runtime(ScriptedEngine(respond), template, LoopSettings(1024, 512, 1536), dispatcher)
    (folder / "recorded").mkdir()
    with RunFolder.create(folder / "recorded", {}) as store:
        await run_tasks(read_tasks(folder / "tasks.jsonl"), runtime, store=store)


@pytest.fixture
def look(tmp_path: Path) -> Path:
    """The folder in which a test tells the tool how to behave."""
    folder = tmp_path / "look"
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ran]


@pytest.fixture
def run(
    project: Path,
    tmp_path: Path,
    look: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`turntrace run` into tmp_path/run, in this process: a new one takes seconds to import."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("LOOK", str(look))

    def run(*more: str, tasks: Path = Path("tasks.jsonl")) -> Ran:
        monkeypatch.setattr(
            sys,
            "argv",
            ["turntrace", "run", str(tasks), *RUN[2:], "--out", str(tmp_path / "run"), *more],
        )
        try:
            code: Any = cli.main()
        except SystemExit as end:
            code = end.code
        return Ran(code, *capsys.readouterr())

    return run


def test_a_run_in_a_process_of_its_own(project: Path, tmp_path: Path, look: Path) -> None:
    ran = turntrace(*RUN, "--out", str(tmp_path / "run"), cwd=project, LOOK=str(look))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"conversations          {TASKS} of {TASKS}" in ran.stdout


def test_a_run_whose_output_cannot_be_written_goes_on(
    project: Path, tmp_path: Path, look: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "agent", *RUN, "--out", str(tmp_path / "run")],
            cwd=project,
            env=child_env({"LOOK": str(look)}),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(list(read_trajectories(tmp_path / "run"))) == TASKS


def test_a_run_from_task_file_to_run_folder(run: Run, tmp_path: Path) -> None:
    ran = run("--n", "2", "--limit", "4")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "conversations          8 of 8" in ran.stdout
    trajectories = list(read_trajectories(tmp_path / "run"))
    assert sorted(trajectory.id for trajectory in trajectories) == [
        f"t{task}-{sample}" for task in range(4) for sample in range(2)
    ]
    assert {trajectory.stop_reason for trajectory in trajectories} == {"stop"}
    assert {call.response for trajectory in trajectories for call in trajectory.tool_calls} == {
        "found"
    }
    assert {trajectory.engine["name"] for trajectory in trajectories} == {"scripted"}
    assert "engine.log" not in ran.stdout  # SGLang's processes write one, and none run here


def test_run_json_says_what_was_run(run: Run, project: Path, tmp_path: Path) -> None:
    run("--limit", "1", "--set", "rollout.server.api_key=s3cret")
    manifest = read_manifest(tmp_path / "run")
    assert manifest["tools"] == (project / "tools.yaml").read_text(encoding="utf-8")
    assert manifest["tasks"] == {
        "file": "tasks.jsonl",
        "sha256": task_file_hash(project / "tasks.jsonl"),
    }
    assert (manifest["n"], manifest["limit"], manifest["validate"]) == (1, 1, False)
    assert manifest["config"]["rollout"]["prompt_length"] == 1024
    assert manifest["model"]["sha256"] is None  # recorded turns: no weights are read
    assert len(manifest["model"]["tokenizer_sha256"]) == 64
    assert manifest["counts"]["done"] == 1
    assert manifest["counts"]["stop_reasons"] == {"stop": 1}
    assert manifest["command"].startswith("turntrace run tasks.jsonl")
    assert "s3cret" not in json.dumps(manifest)
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


def test_a_key_without_effect_is_noted_and_the_run_goes_on(run: Run) -> None:
    ran = run("--limit", "1", "--set", "rollout.temperature=0.5")
    assert ran.returncode == 0
    assert "no effect: rollout.temperature" in ran.stderr


def test_what_models_will_stumble_over_is_noted_before_the_run(run: Run, tmp_path: Path) -> None:
    properties = {name: {"type": "integer", "default": None} for name in "abcde"}
    parameters = {"type": "object", "properties": properties}
    schema = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    file = tmp_path / "warned.yaml"
    file.write_text(
        json.dumps([{"class_name": "tools.gsm8k.Gsm8kTool", "tool_schema": schema}]),
        encoding="utf-8",
    )
    ran = run("--tools", str(file))
    notes = [line for line in ran.stdout.splitlines() if line.startswith("note: ")]
    assert [note.count("tool look: ") for note in notes] == [1, 1, 1, 0]
    assert "2 more" in notes[3]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            (),
            "rows.jsonl:2: the row chooses the tools find, seek, but the tool config offers look;",
        ),
        (
            ("--set", "rollout.multi_turn.enable=false"),
            "rows.jsonl:1: the row chooses the tools look, but this run has no tools;",
        ),
    ],
)
def test_a_row_that_chooses_tools_and_would_get_none_is_refused(
    run: Run, tmp_path: Path, extra: tuple[str, ...], says: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row('a', 'look')}\n{row('b', 'find', 'seek')}\n", encoding="utf-8")
    ran = run(*extra, tasks=rows)
    assert ran.returncode == 2
    assert says in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_row_that_chooses_a_tool_too_many_runs_and_is_noted(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row('a', 'look', 'find')}\n{row('b', 'look', 'find')}\n", encoding="utf-8")
    ran = run(tasks=rows)
    assert ran.stdout.count("note: some rows choose the tools find,") == 1
    assert [
        record.tools[0]["function"]["name"] for record in read_trajectories(tmp_path / "run")
    ] == ["look", "look"]


@pytest.mark.parametrize(("names", "offered"), [(["look"], ["look"]), ([], ["look", "see"])])
def test_tool_selection_chooses_the_tools(
    run: Run, project: Path, tmp_path: Path, names: list[str], offered: list[str]
) -> None:
    tools, rows = tmp_path / "two.yaml", tmp_path / "rows.jsonl"
    tools.write_text(f"{TWO_TOOLS}", encoding="utf-8")
    rows.write_text(json.dumps({"prompt": "q:x", "extra_info": {"tool_selection": names}}) + "\n")
    sys.path.insert(0, str(project))
    try:
        run("--tools", str(tools), tasks=rows)
    finally:
        sys.path.remove(str(project))
    [record] = read_trajectories(tmp_path / "run")
    assert [tool["function"]["name"] for tool in record.tools] == offered


def test_an_unknown_name_in_tool_selection_is_refused(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "q", "extra_info": {"tool_selection": ["no_such"]}}))
    ran = run(tasks=rows)
    assert ran.returncode == 2
    assert "rows.jsonl:1: " in ran.stderr
    assert "no_such" in ran.stderr


TWO_TOOLS = """
tools:
  - function: looking_up:look
  - function: looking_up:look
    tool_schema: {type: function, function: {name: see, description: d, parameters: {type: object}}}
"""

USER = """
import pathlib

class User:
    def __init__(self, config):
        with pathlib.Path(__file__).with_name("made").open("a") as made:
            made.write("x")
    async def start_interaction(self, instance_id=None, **kwargs):
        return instance_id
    async def generate_response(self, instance_id, messages, **kwargs):
        return True, "", 0.5, {}
    async def finalize_interaction(self, instance_id=None, **kwargs):
        pass
"""


def test_interactions_are_made_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_user.py").write_text(USER, encoding="utf-8")
    (tmp_path / "users.yaml").write_text(
        "interaction:\n- class_name: one_user.User\n  name: user\n", encoding="utf-8"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"prompt": "q:quick 0", "interaction_kwargs": {"name": "user"}}) + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = f"rollout.multi_turn.interaction_config_path={tmp_path / 'users.yaml'}"
    assert run("--set", path, tasks=rows).returncode == 0
    [record] = read_trajectories(tmp_path / "run")
    assert record.reward_parts == {"user_turn_rewards": [0.5]}
    assert (tmp_path / "made").read_text() == "x"


def test_rows_that_lose_their_user_are_noted(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"prompt": "q:quick 0", "interaction_kwargs": {"name": "user"}}) + "\n"
    )
    ran = run(tasks=rows)
    assert ran.returncode == 0
    [note] = [line for line in ran.stdout.splitlines() if line.startswith("note: ")]
    assert "interaction_config_path" in note


def row(question: str, *tools: str) -> str:
    return json.dumps({"prompt": f"q:{question}", "tools_kwargs": {name: {} for name in tools}})


def test_a_second_run_into_the_same_folder_is_refused(run: Run) -> None:
    assert run("--limit", "1").returncode == 0
    again = run("--limit", "1")
    assert again.returncode == 2
    assert "use --resume" in again.stderr


def test_resume_runs_what_is_missing_and_nothing_twice(run: Run, tmp_path: Path) -> None:
    assert run("--limit", "2").returncode == 0
    before = (tmp_path / "run" / "trajectories.jsonl").read_bytes()
    more = run("--resume")
    assert more.returncode == 0, more.stderr
    assert f"conversations          {TASKS} of {TASKS}" in more.stdout
    assert (tmp_path / "run" / "trajectories.jsonl").read_bytes().startswith(before)
    assert sorted(trajectory.id for trajectory in read_trajectories(tmp_path / "run")) == [
        f"t{index}-0" for index in range(TASKS)
    ]
    rest = run("--resume")
    assert (rest.returncode, rest.stdout) == (
        0,
        f"nothing to do: all {TASKS} conversations are in {tmp_path / 'run'}\n",
    )


def test_resume_with_another_config_names_the_difference(run: Run) -> None:
    assert run("--limit", "1").returncode == 0
    other = run("--resume", "--set", "rollout.response_length=256")
    assert other.returncode == 2
    assert "config.rollout.response_length was 512, is 256" in other.stderr
    assert run("--resume", "--force", "--set", "rollout.response_length=256").returncode == 0


def test_a_forced_resume_with_smaller_limits_leaves_no_defect(run: Run, tmp_path: Path) -> None:
    """Records are checked against the limits that they were made under."""
    assert run("--limit", "2").returncode == 0
    smaller = ("--set", "rollout.response_length=8", "--set", "rollout.max_model_len=2000")
    assert run("--resume", "--force", *smaller).returncode == 0
    records = list(read_trajectories(tmp_path / "run"))
    assert {len(record.response_ids) > 8 for record in records} == {True, False}
    assert verify_run(tmp_path / "run").defects == 0


def test_infrastructure_failures_are_exit_code_1_until_resume_mends_them(
    run: Run, tmp_path: Path, look: Path
) -> None:
    (look / "down").touch()
    ran = run("--limit", "2")
    assert ran.returncode == 1
    assert "2 conversations failed because of infrastructure" in ran.stdout
    assert ran.stdout.splitlines()[-1].endswith("--resume")
    (look / "down").unlink()
    assert run("--limit", "2", "--resume").returncode == 0
    assert [trajectory.infra_error for trajectory in read_trajectories(tmp_path / "run")] == [
        False,
        False,
    ]


def test_an_engine_that_does_not_start_leaves_no_run_behind(run: Run, tmp_path: Path) -> None:
    broken = run("--set", f"rollout.turntrace.recorded={tmp_path}")
    assert broken.returncode == 2
    assert "trajectories.jsonl" in broken.stderr
    assert run("--limit", "1").returncode == 0


@pytest.mark.parametrize("target", ["file", "/dev/full"])
def test_a_tokenizer_that_cannot_be_saved_is_one_line_before_the_engine_starts(
    run: Run, tmp_path: Path, target: str
) -> None:
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    if target == "file":
        (tmp_path / "run" / "tokenizer").rmdir()
        (tmp_path / "run" / "tokenizer").touch()
    else:
        (tmp_path / "run" / "tokenizer" / "tokenizer.json").symlink_to(target)
    ran = run("--limit", "1")
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {tmp_path / 'run' / 'tokenizer'} cannot be written: ")
    assert len(ran.stderr.splitlines()) == 1
    assert "starting" not in ran.stdout
    shutil.rmtree(tmp_path / "run")
    assert run("--limit", "1").returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_finished_and_says_how_to_go_on(
    run: Run, project: Path, tmp_path: Path, look: Path, number: signal.Signals, code: int
) -> None:
    (look / "slow").touch()
    out = tmp_path / "run"
    command = [sys.executable, "-m", "agent", *RUN, "--out", str(out)]
    with subprocess.Popen(
        command, cwd=project, env=child_env({"LOOK": str(look)}), stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for(
            lambda: (
                lines(out / "trajectories.jsonl") == QUICK
                and len(list(look.glob("called-*"))) == TASKS
            ),
            process,
        )
        process.send_signal(number)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == code
    assert (
        f"interrupted: {QUICK} of {TASKS} conversations are in {out}, {TASKS - QUICK} unfinished"
        in said
    )
    assert said.splitlines()[-1].endswith(
        f"turntrace run tasks.jsonl --config config.yaml --out {out} --resume"
    )
    assert lines(out / "unfinished.jsonl") == TASKS - QUICK
    (look / "slow").unlink()
    assert run("--resume").returncode == 0
    assert sorted(trajectory.id for trajectory in read_trajectories(out)) == [
        f"t{index}-0" for index in range(TASKS)
    ]
    assert lines(out / "unfinished.jsonl") == 0


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits until a running process has got somewhere; its end is a failure of the test."""
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"it never got there: {process.communicate()}")


def test_over_sampling_ends_with_enough(run: Run, tmp_path: Path) -> None:
    ran = run("--n", "2", "--set", "rollout.over_sample_rate=0.25")
    assert (ran.returncode, ran.stderr) == (0, "")
    wanted = int(2 * TASKS * 0.75)
    assert f"of {wanted}" in ran.stdout
    assert len(list(read_trajectories(tmp_path / "run"))) >= wanted
    assert not run("--n", "2", "--set", "rollout.over_sample_rate=0.25", "--resume").returncode
    verdict = verify_run(tmp_path / "run")
    assert verdict.defects == 0
