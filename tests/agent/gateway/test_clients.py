"""Unmodified agent programs against the gateway: openai, anthropic, openai-agents, pydantic-ai and
mini-swe-agent, from their own packages, each in a process of its own.

The engine is scripted: odd JSON spacing, parallel calls, a malformed call, an unknown tool, a text.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from agent.errors import EngineError
from agent.gateway import Gateway, session
from agent.runs.loop_thread import LoopThread
from tests.agent.gateway.live import checked, gateway_config_of, hermes_call, live, then
from tests.agent.gateway.programs.relay import Relay
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


def run_client(
    gateway: Gateway, script: str, names: list[str], *, breaks: bool = False
) -> dict[str, str]:
    """Runs a client's script with a session for each name; returns its last texts.

    `breaks`: the connections of the sessions named drop break once.
    """
    opened = {name: open_session(gateway, name) for name in names}
    keys = {name: one["api_key"] for name, one in opened.items()}
    dropped = [key for name, key in keys.items() if "drop" in name]
    with relayed(gateway.url, dropped) if breaks else nullcontext(gateway.url) as url:
        done = client(script, json.dumps({"url": url, "keys": keys}))
    assert done.returncode == 0, done.stderr[-3000:]
    for one in opened.values():
        assert post(f"{gateway.url}/sessions/{one['id']}/finish", {"reward": 1}).is_success
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def client(script: str, given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HERE / "clients" / script],
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )


@contextmanager
def relayed(url: str, keys: list[str]) -> Iterator[str]:
    """The address of a relay before the gateway; the connections of `keys` break once."""
    place = urlsplit(url)
    relay = Relay(place.hostname or "", place.port or 80, keys)
    with closing(LoopThread()) as loop:
        server = loop.run(asyncio.start_server(relay.carry, "127.0.0.1", 0))
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert relay.broken == len(keys)


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


# ---------------------------------------------------------------------- faults

FAULTS = {
    "openai_sdk.py": ["drop chat", "drop responses", "503 chat", "503 responses", "overflow chat"],
    "anthropic_sdk.py": ["drop messages", "503 messages", "overflow messages"],
    "agents_sdk.py": ["drop chat", "503 responses", "sub-agent chat", "sub-agent responses"],
    "pydantic_client.py": ["drop chat", "503 chat", "sub-agent chat", "compaction chat"],
}
"""Sessions by their names. Where an SDK has no compaction of its own, its script has one."""
SUBTASK = "Look twice, and say what you saw."
DELEGATE = hermes_call("delegate", {"input": SUBTASK})


class Faulty:
    """Says `CLEAN`, but gives no answer to the second turn of a session named 503, once."""

    def __init__(self) -> None:
        self.was_down: set[str] = set()

    def __call__(self, prompt: str) -> str:
        name = prompt.rpartition("<|im_start|>user\n")[0] or prompt
        if "Summarise the work" in prompt:
            return "It was looked at."
        if "So far: It was looked at." in prompt:
            return "It is 42.\n"
        if "sub-agent" in prompt:
            return then(DELEGATE, "It is 42.\n")(prompt)
        is_second = prompt.count("<|im_start|>assistant") == 2
        if "503" in prompt and is_second and name not in self.was_down:
            self.was_down.add(name)
            raise EngineError("the scheduler is gone")
        return CLEAN(prompt)


@pytest.mark.parametrize("script", FAULTS)
def test_faults_through_an_unmodified_client(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost and nothing twice: what was not delivered is given again, not sampled."""
    monkeypatch.setattr(session, "RETRY_AFTER_S", 1)
    config = gateway_config_of(prompt_length=1, response_length=3000)
    plan = Faulty()
    with live(tmp_path, plan, config=config) as gateway:
        ended = run_client(gateway, script, FAULTS[script], breaks=True)
    assert {text.strip() for text in ended.values()} == {"It is 42."}
    records = checked(tmp_path).trajectories
    assert len(records) == len(FAULTS[script])
    assert len(plan.was_down) == sum("503" in name for name in FAULTS[script])
    for record in records.values():
        assert (record.stop_reason, record.infra_error, record.reward) == ("stop", False, 1.0)
        reasons = [branch.reason for branch in record.branches]
        if "drop" in record.task_id or "503" in record.task_id:
            assert (record.num_turns, reasons) == (3, [])
        elif "sub-agent" in record.task_id:
            assert (record.num_turns, reasons) == (3, ["new"])  # the helper has more turns
        else:
            assert reasons == ["new", "new"]  # the summary, and what follows it
        is_refused = [one.kind for one in record.warnings] == ["refused_requests"]
        assert is_refused == ("overflow" in record.task_id)


SEE = f"I look.\n{hermes_call('bash', {'command': 'echo seen > file && cat file'})}"
SUBMIT = hermes_call("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})
MALFORMED = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"\n</tool_call>'
MINI = then(SEE, SUBMIT)


@pytest.mark.parametrize("case", ["clean", "malformed", "drop", "503"])
def test_mini_swe_agent_from_its_command_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "RETRY_AFTER_S", 1)
    work = tmp_path / "work"
    work.mkdir()
    ahead = [case] if case in ("malformed", "503") else []

    def plan(prompt: str) -> str:
        turn = prompt.count("<|im_start|>assistant")
        if ahead == ["malformed"]:
            ahead.clear()
            return MALFORMED
        if ahead and turn == 2:
            ahead.clear()
            raise EngineError("the scheduler is gone")
        return MINI(prompt)

    with live(tmp_path / "run", plan) as gateway:
        opened = open_session(gateway, "mini")
        key = opened["api_key"]
        cut = relayed(gateway.url, [key]) if case == "drop" else nullcontext(gateway.url)
        with cut as url:
            done = subprocess.run(
                [sys.executable, "-m", "minisweagent.run.mini", "-m", "openai/m", "-t",
                 "List files.", "-y", "--exit-immediately", "-o", "trajectory.json"],
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
                    "OPENAI_API_KEY": key,
                    "OPENAI_BASE_URL": f"{url}/v1",
                    "PATH": os.environ["PATH"],
                },
            )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert post(f"{gateway.url}/sessions/{opened['id']}/finish", {}).is_success
    record = checked(tmp_path / "run").only
    assert (work / "file").read_text() == "seen\n"
    assert not ahead
    # It leaves a turn with a malformed call out, and asks again with the error in its place.
    reasons = ["dropped"] if case == "malformed" else []
    assert [branch.reason for branch in record.branches] == reasons
    turns = [*record.turns, *(turn for branch in record.branches for turn in branch.turns)]
    assert len(turns) == 2 + len(reasons)
