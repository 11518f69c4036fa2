"""`tools check` shows what the model sees, `tools call` does what a run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from agent.model.base import base_model_dir
from tests.command import turntrace
from tests.helpers import fresh_tokenizer, hermes_template

ROOT = Path(__file__).resolve().parents[3]

MODULE = """
import asyncio
import pathlib
import time
from tools.base import BackendError, BaseTool, ToolConfigError, ToolError

def note(word):
    with open("log", "a") as log:
        log.write(word + "\\n")

class Logged(BaseTool):
    "Notes what is done with it."
    async def start(self):
        note("start")
        if self.config.get("broken"):
            raise ToolConfigError("its backend is not there")
    async def create(self, instance_id=None, **kwargs):
        note(f"create {kwargs}")
        return instance_id, "welcome"
    async def execute(self, instance_id, parameters, **kwargs):
        note(f"execute {parameters}")
        if parameters.get("do") == "hang":
            pathlib.Path("hanging").touch()
            await asyncio.sleep(600)
        if parameters.get("do") == "refuse":
            raise ToolError("not today")
        if parameters.get("do") == "break":
            raise BackendError("connection refused")
        return "\\x1b[31mred " + "long " * 300, -0.5, {"seen": 1}
    async def calc_reward(self, instance_id, **kwargs):
        return 0.25
    async def release(self, instance_id, **kwargs):
        note("release")
    async def close(self):
        note("close")

class Asking(Logged):
    asks_model = True
"""
PARAMETERS = {
    "type": "object",
    "properties": {"do": {"enum": ["hang", "refuse", "break"]}},
    "additionalProperties": False,
}
SCHEMA = {
    "type": "function",
    "function": {"name": "logged", "description": "Größer ☃", "parameters": PARAMETERS},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logged_tools.py").write_text(textwrap.dedent(MODULE))
    for name, made, config in (
        ("tools", "Logged", {"rate_limit": 2, "ends_conversation": True}),
        ("broken", "Logged", {"broken": True}),
        ("asking", "Asking", {}),
    ):
        entry = {"class_name": f"logged_tools.{made}", "config": config, "tool_schema": SCHEMA}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump([entry], allow_unicode=True, sort_keys=False)
        )
    return tmp_path


def tools(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return turntrace("tools", *arguments, cwd=folder)


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_check_shows_class_policy_and_schema_and_starts_what_it_must(folder: Path) -> None:
    ran = tools(folder, "check", "tools.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "logged_tools.Logged" in ran.stdout
    assert "timeout_s 60.0, rate_limit 2.0, ends_conversation true" in ran.stdout
    assert "backend  ready after" in ran.stdout
    assert json.loads(ran.stdout.split("What the model sees:\n")[1].splitlines()[0]) == SCHEMA
    assert log(folder) == ["start", "close"]


def test_check_names_a_function_by_its_own_name(folder: Path) -> None:
    (folder / "my_tools.py").write_text("def twice(x: int) -> int:\n    return 2 * x\n")
    (folder / "own.yaml").write_text("- function: my_tools:twice\n")
    ran = tools(folder, "check", "own.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "  function my_tools.twice\n  policy   timeout_s 60.0\n" in ran.stdout


def test_check_without_start_starts_nothing(folder: Path) -> None:
    ran = tools(folder, "check", "broken.yaml", "--no-start")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert log(folder) == ["close"]


def test_check_names_a_server_that_is_not_there_and_what_has_no_backend(folder: Path) -> None:
    search = {
        "class_name": "tools.search.SearchTool",
        "config": {"retrieval_service_url": "http://127.0.0.1:1"},
        "tool_schema": SCHEMA,
    }
    answer = {
        "class_name": "tools.gsm8k.Gsm8kTool",
        "tool_schema": {"type": "function", "function": {"name": "answer"}},
    }
    (folder / "away.yaml").write_text(yaml.safe_dump([search, answer]))
    ran = tools(folder, "check", "away.yaml")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert (
        "backend  failed: tool logged: the search server at http://127.0.0.1:1/retrieve"
        in ran.stdout
    )
    assert "backend  none to start" in ran.stdout


def test_check_says_what_does_not_start(folder: Path) -> None:
    ran = tools(folder, "check", "broken.yaml")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "backend  failed: tool logged: its backend is not there" in ran.stdout


def test_check_with_a_model_shows_the_prompt_itself(folder: Path) -> None:
    ran = tools(folder, "check", "tools.yaml", "--no-start", "--model", "smollm2-base")
    template = hermes_template()
    asked: list[Any] = [{"role": "user", "content": "..."}]
    with_tools, without = (
        [token for _, ids in template.prompt(asked, tools) for token in ids]
        for tools in ([SCHEMA], [])
    )
    assert template.decode(with_tools) in ran.stdout
    assert (
        f"({len(with_tools)} tokens; {len(with_tools) - len(without)} of them are the tools')"
        in ran.stdout
    )


def test_check_with_a_template_that_needs_tools(folder: Path) -> None:
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.chat_template = "{{ tools | length }} tools\n" + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    ran = tools(folder, "check", "tools.yaml", "--no-start", "--model", "model")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "1 tools<|im_start|>" in ran.stdout


def test_call_does_what_a_run_does(folder: Path) -> None:
    ran = tools(folder, "call", "tools.yaml", "logged", "--ground-truth", "7")
    assert (ran.returncode, ran.stderr) == (0, "")
    for said in (
        "status       ok",
        "step reward  -0.5",
        "reward       0.25",
        'metrics      {"seen": 1}',
        "--- created\nwelcome",
    ):
        assert said in ran.stdout
    assert "--- response\n␛[31mred " + "long " * 300 in ran.stdout
    assert log(folder) == [
        "start",
        "create {'ground_truth': '7'}",
        "execute {}",
        "release",
        "close",
    ]


def test_call_with_a_model_cuts_as_a_run_does(folder: Path) -> None:
    ran = tools(folder, "call", "tools.yaml", "logged", "--model", "smollm2-base")
    assert ran.returncode == 0
    assert "long " * 300 not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"do": "refuse"}', "status       tool_error"),
        ('{"do": "refuse"}', "--- response\nnot today"),
        ('{"do": "break"}', "error        BackendError: connection refused"),
        ('{"do": "break"}', "--- response\nError: logged is not available"),
        (
            '{"doo": 1}',
            "Error: invalid arguments for logged: arguments: Additional properties",
        ),
    ],
)
def test_a_call_that_fails_shows_its_status_and_what_the_model_is_told(
    folder: Path, arguments: str, says: str
) -> None:
    ran = tools(folder, "call", "tools.yaml", "logged", arguments)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert says in ran.stdout
    assert log(folder)[-2:] == ["release", "close"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["call", "tools.yaml", "logd"], "tools.yaml has no tool 'logd'; did you mean 'logged'?"),
        (
            ["call", "tools.yaml", "logged", "{do: 1}"],
            "the arguments are not JSON: Expecting property name",
        ),
        (["call", "tools.yaml", "logged", "[" * 100000], "the arguments are not JSON: "),
        (["call", "tools.yaml", "logged", "[1]"], "the arguments must be a JSON object, got [1]"),
        (["call", "broken.yaml", "logged"], "tool logged: its backend is not there"),
        (["call", "asking.yaml", "logged"], "logged asks its conversation's model"),
        (["check", "no.yaml"], "no.yaml: there is no such file"),
        (["check", "gsm8"], "'gsm8' is not a shipped tool config; did you mean 'gsm8k'?"),
        (["check", "tools.yaml", "--no-start", "--model", "nowhere/nothing"], "nowhere/nothing"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, arguments: list[str], says: str) -> None:
    ran = tools(folder, *arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert says in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_ctrl_c_ends_in_good_order(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "agent",
        "tools",
        "call",
        "tools.yaml",
        "logged",
        '{"do": "hang"}',
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as running:
        while not (folder / "hanging").exists() and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert "Traceback" not in said
    assert running.returncode not in (0, 1, 2)
    assert log(folder)[-2:] == ["release", "close"]


def test_ctrl_c_while_a_server_is_asked_what_it_offers_ends_the_server(folder: Path) -> None:
    (folder / "mcp.yaml").write_text(
        yaml.safe_dump([{"mcp": {"command": "sleep", "args": ["601"]}}])
    )
    command = [sys.executable, "-m", "agent", "tools", "check", "mcp.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as running:
        while not (
            started := [
                child for child in psutil.Process(running.pid).children() if child.name() == "sleep"
            ]
        ):
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert "Traceback" not in said
    assert not started[0].is_running()


def test_check_warns_of_what_models_will_stumble_over(folder: Path) -> None:
    parameters = {
        "type": "object",
        "properties": {"solution": {"type": "string", "default": None}},
        "required": ["code"],
    }
    schema = {"type": "function", "function": {"name": "submit", "parameters": parameters}}
    entry = {"class_name": "tools.gsm8k.Gsm8kTool", "tool_schema": schema}
    (folder / "warned.yaml").write_text(yaml.safe_dump([entry]))
    ran = tools(folder, "check", "warned.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    warnings = [line for line in ran.stdout.splitlines() if line.startswith("  warning ")]
    assert len(warnings) == 2
    assert "required" in warnings[0]
    assert "default" in warnings[1]
