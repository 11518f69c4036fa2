"""Garbage collections in a process that runs conversations."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from agent.engines.scripted import ScriptedEngine
from agent.loop.batch import run_tasks
from agent.runs.collector import settle_collector
from tests.bench.workload import TOOL_SCHEMA, EchoTool, tasks, workload
from tests.helpers import runtime


@pytest.fixture
def settings() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def collections() -> int:
    """How many collections a run of 64 conversations starts."""
    work, count = workload(), sum(each["collections"] for each in gc.get_stats())
    shared = runtime(
        work.template,
        ScriptedEngine(work.respond),
        [EchoTool({}, TOOL_SCHEMA)],
        shorten=lambda text: None,
        max_turns=4,
        response_length=1024,
        max_model_len=4096,
    )
    progress = asyncio.run(run_tasks(tasks(64), shared))
    assert progress.turns == 4 * 64
    return sum(each["collections"] for each in gc.get_stats()) - count


def test_a_run_starts_few_collections(settings: None) -> None:
    gc.set_threshold(700, 10, 10)
    often = collections()
    settle_collector()
    assert 10 * collections() < often
    assert gc.get_freeze_count() > 10_000
