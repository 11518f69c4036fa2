"""Unmodified agent programs against the gateway: openai, anthropic, openai-agents, pydantic-ai and
mini-swe-agent, from their own packages, each in a process of its own.

The engine is scripted: odd JSON spacing, parallel calls, a malformed call, an unknown tool, a text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from agent.gateway import Gateway
from tests.agent.gateway.live import Plan, checked, hermes_call, live, then
from tests.agent.overlay import variables

pytestmark = pytest.mark.stack

HERE = Path(__file__).parent
LOOK = hermes_call("look", '{"question" :  "first \\u00e9 <b>" }')
CLEAN = then(f" \n{LOOK}", f"{LOOK}\n{hermes_call('look', {'question': 'second'})}", "It is 42.\n")
BROKEN = then(
    f"Let me see. {LOOK}",
    '<tool_call>\n{"name": "look", "arguments": {"question": "x"\n</tool_call>',
    hermes_call("no_such_tool", {"x": 1}),
    "It is 42.",
)


def run_client(gateway: Gateway, script: str, names: list[str]) -> dict[str, str]:
    """Runs a client's script with a session for each name; returns its last texts."""
    opened = {name: open_session(gateway, name) for name in names}
    keys = {name: one["api_key"] for name, one in opened.items()}
    done = subprocess.run(
        [sys.executable, HERE / "clients" / script],
        input=json.dumps({"url": gateway.url, "keys": keys}),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for one in opened.values():
        assert post(f"{gateway.url}/sessions/{one['id']}/finish", {"reward": 1}).is_success
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """For a client: its own packages, and no way out but the loopback."""
    quiet = {"OPENAI_AGENTS_DISABLE_TRACING": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return {**variables(HERE / "clients.txt"), **quiet, "NO_COLOR": "1"}


def open_session(gateway: Gateway, name: str) -> dict[str, str]:
    found: dict[str, str] = post(f"{gateway.url}/sessions", {"task_id": name}).json()
    return found


def post(url: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60)


CLIENTS = {
    "openai_sdk.py": [
        "chat", "chat stream", "responses", "responses stream", "broken chat",
        "broken responses stream",
    ],
    "anthropic_sdk.py": ["messages", "messages stream", "broken messages stream"],
    "agents_sdk.py": ["responses", "responses stream", "chat"],
    "pydantic_client.py": ["chat", "responses", "broken chat", "broken responses"],
}  # fmt: skip
"""Sessions by their names. openai-agents ends a run at a call that it cannot read or does not know.
"""


def both(prompt: str) -> str:
    """Broken calls in the sessions that are called so."""
    return (BROKEN if "broken" in prompt else CLEAN)(prompt)


@pytest.mark.parametrize("script", CLIENTS)
def test_an_unmodified_client_is_one_sequence(script: str, tmp_path: Path) -> None:
    with live(tmp_path, both) as gateway:
        ended = run_client(gateway, script, CLIENTS[script])
    assert {text.strip() for text in ended.values()} == {"It is 42."}
    records = checked(tmp_path).trajectories
    assert len(records) == len(CLIENTS[script])
    for record in records.values():
        is_broken = "broken" in record.task_id
        invalid = ["malformed", "unknown_tool"] if is_broken else ["external", "external"]
        assert [call.status for call in record.tool_calls] == ["external", *invalid]
        assert (record.num_turns, record.branches) == (4 if is_broken else 3, [])
        assert record.reward == 1.0


MINI: Plan = then(
    f"I look.\n{hermes_call('bash', {'command': 'echo seen > file && cat file'})}",
    hermes_call("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}),
)


def test_mini_swe_agent_from_its_command_line(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with live(tmp_path / "run", MINI) as gateway:
        opened = open_session(gateway, "mini")
        done = subprocess.run(
            [sys.executable, "-m", "minisweagent.run.mini", "-m", "openai/m", "-t", "List files.",
             "-y", "--exit-immediately", "-o", "trajectory.json"],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            env={
                **environment(),
                "MSWEA_CONFIGURED": "true",
                "MSWEA_COST_TRACKING": "ignore_errors",
                "MSWEA_SILENT_STARTUP": "1",
                "MSWEA_GLOBAL_CONFIG_DIR": str(work),
                "HOME": str(work),
                "OPENAI_API_KEY": opened["api_key"],
                "OPENAI_BASE_URL": opened["openai_base_url"],
                "PATH": os.environ["PATH"],
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert post(f"{gateway.url}/sessions/{opened['id']}/finish", {}).is_success
    record = checked(tmp_path / "run").only
    assert (work / "file").read_text() == "seen\n"
    assert (record.num_turns, record.branches) == (2, [])
