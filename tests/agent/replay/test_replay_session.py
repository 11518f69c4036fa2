"""A session with branches, replayed: the client's messages again, divergence by branch and turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.loop.record import trajectory_of
from agent.replay.compare import Scope, compare_records
from agent.replay.playback import played_back
from agent.replay.session import SessionReplay, converse_again
from conversations.branches import sequences
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests.command import turntrace
from tests.conversations.session.sessions import branched, session_run
from tests.helpers import hermes_template, logprobs, runtime


@pytest.fixture(scope="module")
def hermes() -> ChatTemplate:
    return hermes_template()


@pytest.fixture(scope="module")
def record(hermes: ChatTemplate) -> Trajectory:
    return branched(hermes).record()


class Recorded:
    """A live model that says what was recorded, but for one turn of a sequence."""

    def __init__(self, record: Trajectory, other: tuple[int, int]) -> None:
        self.turns: list[Generation] = []
        for number, part in enumerate(sequences(record)):
            ids = part.prompt_ids + part.response_ids
            for place, turn in enumerate(part.turns):
                said = ids[turn.start : turn.end]
                if (number, place) == other:
                    said = [said[0] + 1, *said[1:]]
                self.turns.append(Generation(said, logprobs(said), turn.finish_reason))

    def __call__(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        return self.turns.pop(0)


async def again(record: Trajectory, hermes: ChatTemplate, engine: object = None) -> Trajectory:
    shared = runtime(hermes, engine)
    if engine is None:
        shared = played_back(shared, record)
    conversation = SessionReplay(record, 0, shared)
    await converse_again(conversation)
    return trajectory_of(conversation)


async def test_a_recorded_replay_is_the_session(record: Trajectory, hermes: ChatTemplate) -> None:
    other = await again(record, hermes)
    assert compare_records(record, other, Scope(False, False, hermes.decode)) is None
    assert other.reward_parts == record.reward_parts
    for one, two in zip(record.branches, other.branches, strict=True):
        assert dataclasses.replace(two, client=one.client) == one


async def test_the_first_divergence_is_named_by_branch_and_turn(
    record: Trajectory, hermes: ChatTemplate
) -> None:
    number = next(n for n, one in enumerate(record.branches, 1) if one.reason == "new")
    model = Recorded(record, (number, 0))
    other = await again(record, hermes, ScriptedEngine(model))
    first = compare_records(record, other, Scope(True, False, hermes.decode))
    assert first is not None
    assert (first.kind, first.branch, first.turn) == ("sampled", number, 0)


def test_the_command_replays_a_session(hermes: ChatTemplate, tmp_path: Path) -> None:
    run = session_run(tmp_path / "run", hermes)
    out = tmp_path / "again"
    ran = turntrace(
        "replay", str(run), "--model", "recorded", "--tools", "recorded", "--out", str(out),
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert verify_run(out).defects == 0
    refused = turntrace("replay", str(run), "--tools", "live", "--out", "x", cwd=tmp_path)
    assert refused.returncode
    assert "--tools recorded" in refused.stdout + refused.stderr
