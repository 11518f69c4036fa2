"""No false alarm on what the loop writes of a misbehaving world, nor on what the real engine
samples."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest

from agent.loop.batch import run_tasks
from agent.loop.runtime import Runtime
from conversations.checks.facts import RunFacts, facts_of
from conversations.checks.finding import Defect
from conversations.checks.record import check_line
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.truncate import SIDES
from conversations.verify import verify_run
from tests.agent.loop.test_fidelity import World, writer_for
from tests.agent.loop.test_users import asks, patient
from tests.helpers import QUESTION, Toy, call, hermes_template, runtime, says, settings, task

WORLDS = 150


def facts(world: World, ids: int | None) -> RunFacts:
    """What a run.json would say of a world, whose tokenizer has so many ids."""
    limits = {
        field.name: getattr(world.settings, field.name)
        for field in dataclasses.fields(RunFacts)
        if hasattr(world.settings, field.name)
    }
    cuts = tuple((world.cut_limit, side) for side in SIDES) if world.cut_limit else ()
    return RunFacts(
        **limits,
        template=world.template,
        ids=ids,
        n=1,
        cuts=cuts,
        max_invalid_calls=world.settings.max_consecutive_invalid_calls,
    )


def in_float32(trajectory: Trajectory) -> Trajectory:
    """The worlds' extreme log-probs as an engine has them."""
    values = [
        None if value is None else struct.unpack("f", struct.pack("f", value))[0]
        for value in trajectory.response_logprobs
    ]
    return dataclasses.replace(trajectory, response_logprobs=values)


async def test_worlds_of_odd_conversations_verify(template: ChatTemplate) -> None:
    """Engines that fail, hang, cut and spell oddly; tools that fail in every way; tight budgets:
    see test_fidelity.py."""
    worlds = [World(writer_for(template), f"verify{seed}") for seed in range(WORLDS)]
    trajectories = await asyncio.gather(*(asyncio.create_task(world.run()) for world in worlds))
    known = facts_of({}, template).ids
    for world, trajectory in zip(worlds, map(in_float32, trajectories), strict=True):
        finished = trajectory.stop_reason != "cancelled"
        checked = check_line(
            trajectory.to_line().encode() + b"\n", facts(world, known), finished=finished
        )
        assert checked.findings == [], trajectory.id
    assert len({trajectory.stop_reason for trajectory in trajectories}) == 9


async def test_user_turns_verify(template: ChatTemplate) -> None:
    for turns, limits in (
        (["It is 41.", call("toy", do="say", text="no"), "Hm.", "It is 42."], {}),
        (["It is 41."], {"response_length": 40}),
    ):
        shared = dataclasses.replace(
            runtime(template, says(template, *turns), [Toy()], **limits), interactions=patient()[0]
        )
        records: list[Any] = []
        await run_tasks([asks(who="long " * 30)], shared, on_done=records.append)
        known = facts_of(
            {"config": {"rollout": {"multi_turn": {"interaction_config_path": "i.yaml"}}}}, template
        )
        assert check_line(records[0].to_line().encode() + b"\n", known).findings == []
        assert records[0].stop_reason == ("length" if limits else "stop")


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="session")
async def test_what_the_real_engine_samples_verifies(sglang_rollout: Any, tmp_path: Path) -> None:
    template = hermes_template()
    limits = settings(
        prompt_length=512,
        response_length=256,
        max_model_len=1024,
        max_tokens=24,
        max_turns=3,
        sampling={"temperature": 1.0},
    )
    dispatcher = runtime(template, None, [Toy()]).dispatcher
    given = [task(f"t{index}", messages=QUESTION) for index in range(3)]
    with RunFolder.create(tmp_path, {"n": 2}) as folder:
        template.tokenizer.save_pretrained(tmp_path / "tokenizer")
        await run_tasks(
            given, Runtime(sglang_rollout.engine(), template, limits, dispatcher), n=2, store=folder
        )
    defects: list[Defect] = []
    verdict = verify_run(tmp_path, on_defect=defects.append)
    assert [str(defect) for defect in defects] == []
    assert verdict.counts["done"] == 6
