"""The load's contenders do the same work, whether conversations end together or apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.engines.engine import Generation
from agent.engines.scripted import ScriptedEngine
from tests.bench.gpu.load import TURNS, Load, turns_each
from tests.bench.gpu.machine import Gpu
from tests.helpers import hermes_template

TOKENS = 64


@pytest.fixture
def load() -> Iterator[Load]:
    loop = asyncio.new_event_loop()
    engine = ScriptedEngine(
        lambda ids, sampling: Generation([7] * TOKENS, [-1.0] * TOKENS, "length")
    )

    async def raw(ids: list[int], sampling: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return {"output_ids": [7] * TOKENS}

    yield Load(engine, raw, hermes_template(), Gpu(), loop, TOKENS)
    loop.close()


@pytest.mark.parametrize("apart", [False, True])
def test_all_contenders_sample_as_many_turns(load: Load, tmp_path: Path, apart: bool) -> None:
    turns = sum(turns_each(5, apart))
    assert load.ideal(5, 0.0, apart=apart).turns == turns
    assert load.ours(5, 0.0, apart=apart).turns == turns
    stored = load.ours(5, 0.0, tmp_path / "run", apart=apart)
    assert stored.tokens == turns * TOKENS
    assert len(load.requests.ended) == turns
    made = [one.num_turns for one in stored.trajectories]
    assert sorted(made) == sorted(turns_each(5, apart))


def test_apart_is_four_turns_on_average() -> None:
    assert sum(turns_each(5, True)) == 15 * TURNS
