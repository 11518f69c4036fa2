"""Hundreds of conversations with the worst tools: all on disk, each failure with its status."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil

from conversations.run.store import read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import ToolCallRecord, Trajectory
from tests import chaos
from tests.chaos import Chaos, Kind, WebTool
from tests.chaos_server import HUGE_BYTES
from tests.helpers import until

CONVERSATIONS = int(os.environ.get("TURNTRACE_CHAOS", "500"))
NEVER_RUN = ("malformed", "unknown_tool", "invalid_arguments", "rejected")


async def test_hundreds_of_conversations_in_chaos(smollm2: ChatTemplate, tmp_path: Path) -> None:
    process = psutil.Process()
    files, children = process.num_fds(), set(process.children())
    run = await chaos.run(smollm2, tmp_path, CONVERSATIONS)
    print(
        f"wall {run.wall_s:.2f} s, ideal {run.ideal_s:.2f} s, "
        f"ratio {run.wall_s / run.ideal_s:.3f}, {run.deaths} deaths"
    )

    records = {record.task_id: record for record in read_trajectories(tmp_path)}
    assert len(records) == len(run.kinds) == CONVERSATIONS
    for index, kind in enumerate(run.kinds):
        check(records[f"c{index:04}"], kind, run)
    patient = [
        line for record in records.values() for line in record.tool_calls if line.name == "patient"
    ]
    assert max(len(line.attempts) for line in patient) > 1
    assert run.deaths >= 1

    for toy in (run.tools["toy"], run.tools["stuck"], run.tools["weak"]):
        created = {instance for step, instance in toy.log if step == "create"}
        assert all(toy.count("release", instance) == 1 for instance in created)
        assert toy.count("release") == len(created)

    assert run.wall_s < run.serial_s / 4  # nothing waits for what is not its own
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert set(process.children()) == children
    assert process.num_fds() <= files


def check(record: Trajectory, kind: Kind, run: Chaos) -> None:
    """The ledger against what the conversation provoked and what the tools saw."""
    where = (record.id, kind.name)
    assert (record.stop_reason, record.num_turns) == ("stop", len(kind.turns) + 1), where
    for line, expected in zip(record.tool_calls, kind.statuses, strict=True):
        assert line.status == (expected or line.status), (*where, line)
        assert line.response is not None
        assert len(line.response) < 4000
        assert bool(line.attempts) == (line.status not in NEVER_RUN and line.name != "weak"), (
            *where,
            line,
        )
        if line.attempts:
            check_attempts(line)
    for tool in run.tools.values():
        if isinstance(tool, WebTool):
            attempts = [
                attempt
                for line in record.tool_calls
                if line.name == tool.name
                for attempt in line.attempts
            ]
            assert [
                attempt.status for attempt in attempts if attempt.error_class != "CircuitOpenError"
            ] == tool.seen.get(record.task_id, [])
            assert all(
                attempt.run_s == 0.0
                for attempt in attempts
                if attempt.error_class == "CircuitOpenError"
            )
    infra = any(line.status == "backend_error" for line in record.tool_calls)
    assert (record.infra_error, record.reward) == ((True, None) if infra else (False, 1.0)), where


def check_attempts(line: ToolCallRecord) -> None:
    """Each says how it ended, and how large what it answered was."""
    last = line.attempts[-1]
    assert (last.status, last.error) == (line.status, line.error)
    assert (last.error_class is None) == (last.status == "ok")
    assert line.queue_s == sum(attempt.queue_s for attempt in line.attempts)
    assert line.run_s == sum(attempt.run_s for attempt in line.attempts)
    if line.status == "ok":
        whole = line.response if line.full_response is None else line.full_response
        assert whole is not None
        assert last.bytes == len(whole.encode())
        assert (last.tokens_cut > 0) == (line.full_response is not None)
        huge = line.name == "huge" or (
            isinstance(line.arguments, dict) and line.arguments.get("do") == "huge"
        )
        assert (last.bytes == HUGE_BYTES) == huge
