"""A gateway's sessions crossed with faults: a plain HTTP client in each dialect.

Each session ends in the right record, which verifies without a defect; all records go through every
export. Every other session asks a side question too, so that its record has a branch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.gateway import Gateway
from conversations.errors import TemplateError
from conversations.open_run import open_run
from conversations.run.store import (
    UNFINISHED,
    RunFolder,
    read_manifest,
    read_trajectories,
)
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.agent.gateway.live import checked, gateway_config_of, live
from tests.agent.gateway.program import DIALECTS, PATHS, Program
from tests.crossings.exports import PAIRS, without_rows
from tests.crossings.world import HERMES, QUESTION
from tests.helpers import hermes_template, logprobs

SIDE = "A title, please."
MALFORMED = '<tool_call>\n{"name": "desk", "arguments": {"step": 1\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"step": {"type": "integer"}}}


@dataclass(frozen=True)
class SessionFault:
    """What goes wrong at the second turn or after it, and what must be in the record.

    `refused` [status, word]: what the client is told, None if it comes to its end. `limits` are the
    config's. `turns` counts those of the trunk; `asked_again`: the client sends the same again.
    """

    stop_reason: str = "stop"
    infra_error: bool = False
    refused: tuple[int, str] | None = None
    turns: int = 3
    second: str = "external"
    engine: str = ""
    asked_again: bool = False
    drops: bool = False
    limits: dict[str, Any] = field(default_factory=dict)
    is_long: bool = False
    is_given_up: bool = False

    @property
    def warned(self) -> bool:
        """Whether the record says that requests were refused: those that may be changed."""
        return self.stop_reason == "stop" and self.refused is not None


FAULTS = {
    "nothing": SessionFault(),
    "malformed call": SessionFault(second="malformed"),
    "connection drops": SessionFault(drops=True, asked_again=True),
    "engine dies": SessionFault("engine_error", True, (503, "scheduler"), 1, engine="dies"),
    "engine comes back": SessionFault(engine="dies once", asked_again=True),
    "engine says NaN": SessionFault("engine_error", True, (503, "finite"), 1, engine="NaN"),
    "template refuses": SessionFault(refused=(400, "refuse"), turns=1),
    "too long": SessionFault(refused=(400, "maximum"), turns=1, is_long=True),
    "turns used up": SessionFault(
        "max_turns", refused=(400, "budget"), turns=2, limits={"multi_turn.max_assistant_turns": 2}
    ),
    "given up": SessionFault(is_given_up=True),
}
CELLS = [
    pytest.param(fault, dialect, asks_aside, id=f"{fault}-{dialect}")
    for row, fault in enumerate(FAULTS)
    for column, dialect in enumerate(DIALECTS)
    for asks_aside in [(row + column) % 2 == 0 and fault != "turns used up"]
]


class Desks(ScriptedEngine):
    """Says the script, told apart by the answers it is shown. The fault, which the question names,
    strikes at the second turn.
    """

    def __init__(self) -> None:
        super().__init__(self.say)
        self.struck: set[str] = set()

    def say(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        template = hermes_template()
        text = template.decode(list(prompt_ids))
        if SIDE in text:
            return self._says("A title.")
        fault, done = fault_of(text), text.count("<tool_response>")
        if done != 1:
            return self._says(HERMES.turns[done])
        is_first = text not in self.struck
        self.struck.add(text)
        if fault.engine == "dies" or (fault.engine == "dies once" and is_first):
            raise EngineError("the scheduler is gone")
        said = MALFORMED if fault.second == "malformed" else HERMES.turns[1]
        return self._says(said, first=math.nan if fault.engine == "NaN" else -0.5)

    def _says(self, text: str, first: float = -0.5) -> Generation:
        template = hermes_template()
        ids = [*template.encode(text), template.end_id]
        return Generation(ids, [first, *logprobs(ids)[1:]], "stop")


def fault_of(text: str) -> SessionFault:
    return next(fault for name, fault in FAULTS.items() if f"<{name}>" in text)


class RefusingTemplate(ChatTemplate):
    """Refuses the answer to the first call."""

    def prompt(self, messages: Any, *args: Any, **given: Any) -> Any:
        _refuse(messages)
        return super().prompt(messages, *args, **given)

    def follow(self, messages: Any, *args: Any, **given: Any) -> Any:
        _refuse(messages)
        return super().follow(messages, *args, **given)


def _refuse(messages: Sequence[dict[str, Any]]) -> None:
    if any("step 0 done" in str(message["content"]) for message in messages):
        raise TemplateError("I refuse this")


@functools.cache
def refusing_template() -> ChatTemplate:
    return RefusingTemplate(hermes_template().tokenizer)


# ---------------------------------------------------------------------- the client


def tools(dialect: str) -> list[dict[str, Any]]:
    if dialect == "anthropic":
        return [{"name": "desk", "input_schema": SCHEMA}]
    function = {"name": "desk", "parameters": SCHEMA}
    named = {"type": "function", **function}
    return [named if dialect == "responses" else {"type": "function", "function": function}]


def told(dialect: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """What an answer adds to the history, and the ids of its calls."""
    if dialect == "chat":
        message = body["choices"][0]["message"]
        return [message], [call["id"] for call in message.get("tool_calls") or ()]
    if dialect == "anthropic":
        calls = [block["id"] for block in body["content"] if block["type"] == "tool_use"]
        return [{"role": "assistant", "content": body["content"]}], calls
    items = body["output"]
    return items, [item["call_id"] for item in items if item["type"] == "function_call"]


def answered(dialect: str, call_id: str, text: str) -> dict[str, Any]:
    """The message that answers a call."""
    if dialect == "chat":
        return {"role": "tool", "tool_call_id": call_id, "content": text}
    if dialect == "anthropic":
        block = {"type": "tool_result", "tool_use_id": call_id, "content": text}
        return {"role": "user", "content": [block]}
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def ask(program: Program, dialect: str, history: list[dict[str, Any]], **more: Any) -> Any:
    key = "input" if dialect == "responses" else "messages"
    return program.ask(dialect, {"model": "m", "max_tokens": 99, key: history, **more})


def drop(program: Program, dialect: str, history: list[dict[str, Any]]) -> None:
    """Asks, and goes away with a reset before the answer is read."""
    key = "input" if dialect == "responses" else "messages"
    body = {"model": "m", "max_tokens": 99, key: history, "tools": tools(dialect)}
    request = httpx.Request(
        "POST", f"{program.gateway.url}{PATHS[dialect]}", json=body, headers=program.headers
    )
    head = [f"POST {request.url.path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
    with socket.create_connection((request.url.host, request.url.port or 80)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall("\r\n".join([*head, "", ""]).encode() + request.content)
        connection.recv(1)  # the turn is sampled, and most of its answer is not read


def converse(
    program: Program, name: str, dialect: str, *, asks_aside: bool
) -> httpx.Response | None:
    """The tool loop, to its end or to the first refusal, which is returned."""
    fault = FAULTS[name]
    asked = f"{QUESTION} <{name}> in {dialect}"
    history: list[dict[str, Any]] = [{"role": "user", "content": asked}]
    length = 2000 if fault.is_long else 1
    for step in range(3):
        if fault.drops and step == 1:
            drop(program, dialect, history)
        answer = ask(program, dialect, history, tools=tools(dialect))
        if answer.status_code != 200 and fault.asked_again:
            answer = ask(program, dialect, history, tools=tools(dialect))
        if answer.status_code != 200:
            return answer
        if step == 0 and asks_aside:
            aside = ask(program, dialect, [{"role": "user", "content": SIDE}])
            assert aside.status_code == 200
        added, calls = told(dialect, answer.json())
        history += added
        history += [answered(dialect, one, f"step {step} done " * length) for one in calls]
    assert not calls
    return None


# ---------------------------------------------------------------------- the cells


class Gateways:
    """One gateway for all cells with the same limits and template, started when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given_up = 0
        self.running: dict[str, Gateway] = {}
        self.stack = contextlib.ExitStack()

    def of(self, name: str) -> Gateway:
        """The gateway for a fault."""
        is_refusing, limits = name == "template refuses", FAULTS[name].limits
        key = name if limits or is_refusing else "any"
        if key not in self.running:
            template = refusing_template() if is_refusing else hermes_template()
            config = gateway_config_of(max_model_len=8192, response_length=4096, **limits)
            started = live(self.folder / key, engine=Desks(), config=config, template=template)
            self.running[key] = self.stack.enter_context(started)
        return self.running[key]


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    made = Gateways(tmp_path_factory.mktemp("gateways"))
    with made.stack:
        yield made


@pytest.mark.parametrize(("name", "dialect", "asks_aside"), CELLS)
def test_a_fault_in_a_session_ends_in_the_right_record(
    name: str, dialect: str, asks_aside: bool, gateways: Gateways
) -> None:
    fault, gateway = FAULTS[name], gateways.of(name)
    program = Program.of(gateway, task_id=f"{name} {dialect}")
    refused = converse(program, name, dialect, asks_aside=asks_aside)
    if fault.is_given_up:
        gateways.given_up += 1
        url = f"{gateway.url}/sessions/{program.name}"
        assert httpx.delete(url, timeout=60).status_code == 200
        return
    status, word = fault.refused or (None, "")
    assert (refused and refused.status_code) == status
    assert word in (refused.text if refused else "")
    record = Trajectory.from_record(program.finish(reward=1.0))
    assert (record.stop_reason, record.infra_error) == (fault.stop_reason, fault.infra_error)
    assert record.reward == (None if fault.infra_error else 1.0)
    assert [branch.reason for branch in record.branches] == ["new"] * asks_aside
    assert record.num_turns == fault.turns
    answered = ["external", fault.second] if fault.turns == 3 else ["external"] * (fault.turns - 1)
    unanswered = [] if fault.turns == 3 else ["cancelled"]
    assert [line.status for line in record.tool_calls] == answered + unanswered
    assert bool(record.warnings) == fault.warned


def test_the_runs_of_all_cells_verify_and_go_through_every_export(
    gateways: Gateways, tmp_path: Path
) -> None:
    folders = {gateways.of(name).out for name in FAULTS}
    gateways.stack.close()
    records = [one for folder in folders for one in checked(folder).trajectories.values()]
    unfinished = gateways.folder / "any" / UNFINISHED
    kept = list(read_trajectories(unfinished)) if unfinished.exists() else []
    assert len(kept) == gateways.given_up
    together, manifest = tmp_path / "all", read_manifest(gateways.folder / "any")
    with RunFolder.create(together, {**manifest, "counts": None}) as folder:
        hermes_template().tokenizer.save_pretrained(together / "tokenizer")
        for record in records:
            folder.append(record)
    assert records, "run the whole file: the cells before this test make them"
    assert without_rows(open_run(together), tmp_path) == PAIRS
