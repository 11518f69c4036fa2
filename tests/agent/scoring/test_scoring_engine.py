"""The real engine scores what it sampled; negative controls with the embedded model's base."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from agent.loop.batch import run_tasks
from agent.loop.runtime import Runtime
from agent.model.base import base_model_dir
from agent.scoring.compare import Comparison
from agent.scoring.work import score_run
from conversations.run.open_run import open_run
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory
from tests.agent.scoring.toy_model import changed
from tests.helpers import Toy, hermes_template, runtime, settings, task

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def sampled(path: Path, engine: Any, temperature: float) -> Path:
    template = hermes_template()
    limits = settings(
        prompt_length=512,
        response_length=256,
        max_model_len=1024,
        max_tokens=32,
        sampling={"temperature": temperature},
    )
    dispatcher = runtime(template, None, [Toy()]).dispatcher
    questions = ["What is 6 times 7?", "Tell me a story.", "Name three towns."]
    given = [
        task(f"t{number}", messages=[{"role": "user", "content": text}])
        for number, text in enumerate(questions)
    ]
    with RunFolder.create(path, {"n": 2}) as folder:
        template.tokenizer.save_pretrained(path / "tokenizer")
        await run_tasks(given, Runtime(engine, template, limits, dispatcher), n=2, store=folder)
    return path


async def scored(run: Path, engine: Any) -> Comparison:
    comparison = Comparison(engine.describe())
    await score_run(open_run(run), engine, comparison, io.BytesIO())
    print(comparison.as_json())
    return comparison


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_the_engine_gives_what_it_recorded_and_finds_each_change(
    sglang_rollout: Any, tmp_path: Path, temperature: float
) -> None:
    engine = sglang_rollout.engine()
    run = await sampled(tmp_path / "run", engine, temperature)
    clean = await scored(run, engine)
    tokens = sum(sum(record.response_mask) for record in open_run(run))
    assert (clean.records, len(clean.differences), clean.left_out) == (6, tokens, {})
    assert clean.is_met, clean.as_json()

    def rewrite(number: int, record: Trajectory) -> Trajectory:
        ids = list(record.response_ids)
        if number == 4:
            ids[3] = 4521 if ids[3] != 4521 else 4522  # words that no story has here
        return dataclasses.replace(record, response_ids=ids)

    one_token = await scored(changed(tmp_path / "token", run, rewrite), engine)
    assert not one_token.is_met
    assert one_token.worst[0].id == list(open_run(run))[4].id

    said = 1.0 if temperature == 0.7 else 0.7

    def relabel(number: int, record: Trajectory) -> Trajectory:
        return dataclasses.replace(record, sampling={**record.sampling, "temperature": said})

    assert not (await scored(changed(tmp_path / "hot", run, relabel), engine)).is_met


async def test_the_real_engine_with_other_weights_is_found(
    sglang_rollout: Any, tmp_path: Path
) -> None:
    """One vector of all weights is larger by half; the record does not say which weights it was."""
    from safetensors.torch import load_file

    def forget(_: int, record: Trajectory) -> Trajectory:
        turns = [dataclasses.replace(turn, weight_version=None) for turn in record.turns]
        return dataclasses.replace(record, turns=turns)

    engine, name = sglang_rollout.engine(), "model.norm.weight"
    run = changed(tmp_path / "forgot", await sampled(tmp_path / "run", engine, 1.0), forget)
    norm = load_file(base_model_dir() / "model.safetensors")[name]
    await sglang_rollout.update_weights(iter([(name, norm * 1.5)]))
    other = await scored(run, engine)
    await sglang_rollout.update_weights(iter([(name, norm)]))
    same = await scored(run, engine)
    assert (other.is_met, same.is_met) == (False, True)
    assert other.left_out == same.left_out == {}
