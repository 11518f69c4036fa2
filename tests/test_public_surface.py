"""The names that users' scripts, YAML files and trainers' configs import: a rename here is a break
for them.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from agent.commands.export import FORMATS
from conversations.export.formats import export_names
from tests.helpers import ROOT

NAMES = {
    "agent.config": {"Config", "load_config"},
    "agent.gateway": {"Gateway", "ProgramSession"},
    "agent.inference": {"Generations", "InferenceEngine"},
    "agent.interactions": {"Interactions", "SimulatedUser", "load_interactions"},
    "conversations": {"Run", "open_run"},
    "conversations.open_run": {"Run", "open_run"},
    "conversations.trajectory": {"Trajectory"},
    "conversations.verify": {"verify_run"},
    "tools.base": {"BackendError", "BaseTool", "ToolError", "ToolResponse"},
    "tools.function": {"tool"},
    "tools.geo3k": {"Geo3kTool"},
    "tools.gsm8k": {"Gsm8kTool"},
    "tools.sandbox": {"SandboxFusionTool"},
    "tools.search": {"SearchTool"},
}
INSIDE_A_TRAINER = {
    "agent.rollout": {"AgentRollout"},
    "agent.verl_agent_loop": {"TurntraceAgentLoop"},
}
"""Importing these imports verl."""

MODULES_TO_RUN = ("agent", "tools.servers.sandbox", "tools.servers.search", "agent.recipe")

COMMANDS = (
    "advantages doctor export gateway import index model replay rescore run serve show stats tasks "
    "tools verify version view"
)


@pytest.mark.parametrize("module", NAMES)
def test_names_that_users_import(module: str) -> None:
    assert {name for name in NAMES[module] if hasattr(importlib.import_module(module), name)} == (
        NAMES[module]
    )


@pytest.mark.parametrize("module", INSIDE_A_TRAINER)
def test_names_that_trainers_import_are_where_their_configs_say(module: str) -> None:
    file = ROOT / f"{module.replace('.', '/')}.py"
    text = file.read_text(encoding="utf-8")
    assert all(name in text for name in INSIDE_A_TRAINER[module])


@pytest.mark.parametrize("module", MODULES_TO_RUN)
def test_modules_that_are_run(module: str) -> None:
    found = importlib.util.find_spec(module)
    assert found
    main = (
        importlib.util.find_spec(f"{module}.__main__")
        if found.submodule_search_locations
        else found
    )
    assert main


def test_commands_that_users_type() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": "200", "PATH": "", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ")}
    assert set(COMMANDS.split()) <= listed


def test_help_names_every_export_and_every_shipped_tool_config() -> None:
    assert set(FORMATS.split(", ")) == set(export_names())
    shipped = {file.stem for file in (ROOT / "tool_configs").glob("*.yaml")}
    for command in ("run.py", "tools.py"):
        text = (ROOT / "agent" / "commands" / command).read_text(encoding="utf-8")
        named = text.partition("shipped one")[2].partition("mcp, all.")[0] + "mcp, all"
        assert {name for name in shipped if not re.search(rf"\b{name}\b", named)} == set()
