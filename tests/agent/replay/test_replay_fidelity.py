"""Random conversations replayed from their records alone: nothing is lost, no change unseen."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections import Counter
from typing import Any

import pytest

from agent.loop.calls import Dispatcher
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.loop.runtime import Runtime
from agent.replay.compare import NOT_COMPARED, Divergence, Scope, compare_records
from agent.replay.playback import played_back
from agent.replay.restored import replayed
from agent.replay.tools import RecordedTools, stand_ins
from agent.replay.user import RecordedUser, has_user
from conversations.template import ChatTemplate
from conversations.trajectory import CALL_STATUSES, STOP_REASONS, Trajectory
from tests import helpers
from tests.agent.loop.test_fidelity import World, writer_for
from tests.agent.loop.test_users import patient, talk
from tests.agent.replay.test_continuation import Model, cut_off, go_on, shared
from tests.helpers import Toy, call, says

WORLDS = 500


async def worlds(
    template: ChatTemplate, count: int, start: int = 0
) -> list[tuple[World, Trajectory]]:
    """Finished conversations, as their lines on disk give them back."""
    made = [World(writer_for(template), f"replay{seed}") for seed in range(start, start + count)]
    for world in made:
        world.task = dataclasses.replace(
            world.task, extra={"tools_kwargs": world.task.tools_kwargs}
        )
    records = await asyncio.gather(*(asyncio.create_task(world.run()) for world in made))
    pairs = zip(made, records, strict=True)
    return [
        (world, Trajectory.from_line(record.to_line()))
        for world, record in pairs
        if record.stop_reason != "cancelled"
    ]


async def again(world: World, record: Trajectory) -> Trajectory:
    """Both recorded, from the record and the limits of its run."""
    runtime = played_back(Runtime(world.engine, world.template, world.settings), record)
    dispatcher = Dispatcher(
        stand_ins(record), max_parallel_calls=world.max_parallel_calls, shorten=world.cut
    )
    tools = RecordedTools(record, dispatcher, live_model=False)
    parent = {"run": "r", "id": record.id, "turn": None}
    made = replayed(
        record, record.sample, runtime, Counterparts(tools, None), kept=None, parent=parent
    )
    await converse(made)
    return trajectory_of(made)


def plain(record: Trajectory) -> dict[str, Any]:
    """All of a record that may not differ: what `compare_records` looks at, by another way."""
    fields = json.loads(record.to_line())
    for name in (*NOT_COMPARED["trajectory"], "sha256"):
        del fields[name]
    for kind, items in (("turn", fields["turns"]), ("call", fields["tool_calls"])):
        for item in items:
            for name in NOT_COMPARED[kind]:
                del item[name]
    return fields


async def test_random_conversations_are_replayed_from_their_records_alone(
    smollm2: ChatTemplate,
) -> None:
    scope = Scope(live_model=False, live_tools=False, decode=smollm2.decode)
    stops: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    replayed = 0
    for start in range(0, WORLDS, 100):
        for world, record in await worlds(smollm2, 100, start):
            other = await again(world, record)
            assert compare_records(record, other, scope) is None
            assert plain(record) == plain(other)
            assert other.parent == {"run": "r", "id": record.id, "turn": None}
            stops[record.stop_reason] += 1
            statuses.update(line.status for line in record.tool_calls)
            replayed += 1
    assert replayed > 0.9 * WORLDS
    assert set(stops) == set(STOP_REASONS) - {"cancelled"}
    assert set(statuses) - {"cancelled"} == set(CALL_STATUSES) - {"cancelled", "external"}


@pytest.mark.parametrize(
    ("breaks", "settings"),
    [
        (None, {}),
        (None, {"max_user_turns": 1}),
        (None, {"max_turns": 2}),
        (None, {"response_length": 22}),
        ("generate", {}),
        ("start", {}),
        ("text", {}),
        ("reward", {}),
    ],
)
async def test_simulated_users_say_again_what_they_said(
    smollm2: ChatTemplate, breaks: str | None, settings: dict[str, Any]
) -> None:
    turns = ("It is 41.", call("toy", do="reward"), "Hm.", "It is 42.")
    record = await talk(smollm2, patient(breaks)[0], *turns, **settings)
    assert has_user(record) == (breaks is None or bool(settings))
    made = with_user(
        record, played_back(helpers.runtime(smollm2, None, **settings), record), live_model=False
    )
    await converse(made)
    assert (
        compare_records(
            record,
            trajectory_of(made),
            Scope(live_model=False, live_tools=False, decode=smollm2.decode),
        )
        is None
    )
    assert plain(record) == plain(trajectory_of(made))


def with_user(
    record: Trajectory, runtime: Runtime, *, live_model: bool, kept: int | None = None
) -> Conversation:
    dispatcher = Dispatcher(stand_ins(record), max_parallel_calls=16, shorten=lambda text: None)
    tools = RecordedTools(record, dispatcher, live_model=live_model, kept=kept or 0)
    user = RecordedUser(record, live_model=live_model, kept=kept or 0)
    return replayed(record, 0, runtime, Counterparts(tools, user), kept=kept, parent={})


async def test_a_recorded_user_answers_nobody_who_says_something_else(
    smollm2: ChatTemplate,
) -> None:
    record = await talk(smollm2, patient()[0], "It is 41.", "Hm.", "It is 42.")
    made = with_user(
        record, helpers.runtime(smollm2, says(smollm2, "It is 41.", "Well.")), live_model=True
    )
    await converse(made)
    assert (made.ending.stop_reason, made.ending.error, len(made.turns)) == (
        "cancelled",
        "replay: the user has no recorded answer to this",
        2,
    )
    assert trajectory_of(made).reward is None
    same = with_user(
        record,
        helpers.runtime(smollm2, says(smollm2, "It is 41.", "Hm.", "It is 42.")),
        live_model=True,
    )
    await converse(same)
    assert (same.ending.stop_reason, trajectory_of(same).reward_parts) == (
        "stop",
        record.reward_parts,
    )


async def test_a_fork_keeps_what_its_user_said(smollm2: ChatTemplate) -> None:
    record = await talk(
        smollm2, patient()[0], "It is 41.", call("toy", do="say"), "Hm.", "It is 42."
    )
    runtime = played_back(helpers.runtime(smollm2, None), record, 2)
    made = with_user(record, runtime, live_model=False, kept=2)
    await converse(made)
    assert plain(trajectory_of(made)) == plain(record)


@pytest.mark.parametrize("cut", [(0, 3), (1, 7), (2, 0)])
async def test_a_conversation_that_was_cut_off_and_gone_on_with_is_replayed_like_one(
    smollm2: ChatTemplate, cut: tuple[int, int]
) -> None:
    model = Model(smollm2, "v1", cut)
    first = await cut_off(
        Conversation(helpers.task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )
    record = await go_on(first, shared(smollm2, Model(smollm2, "v2"), Toy()))
    assert any(turn.resumed for turn in record.turns) == (cut[1] > 0)
    made = with_user(record, played_back(helpers.runtime(smollm2, None), record), live_model=False)
    made.user = None
    await converse(made)
    assert (
        compare_records(
            record,
            trajectory_of(made),
            Scope(live_model=False, live_tools=False, decode=smollm2.decode),
        )
        is None
    )


# ---------------------------------------------------------------------- what is compared


def changed(
    record: Trajectory, rng: random.Random
) -> tuple[Trajectory, str, dict[str, Any]] | None:
    """The record with one thing changed, the kind of that difference, and where; None if absent."""
    shift, ids = len(record.prompt_ids), record.prompt_ids + record.response_ids
    what = rng.choice(
        [
            "prompt",
            "sampled",
            "delta",
            "logprob",
            "turn",
            "call",
            "answer",
            "reward",
            "end",
            "record",
            "message",
        ]
    )
    fields: dict[str, Any] = json.loads(record.to_line())
    turn = rng.randrange(len(record.turns)) if record.turns else None
    line = rng.randrange(len(record.tool_calls)) if record.tool_calls else None
    if what == "prompt" and record.prompt_ids:
        at = rng.randrange(shift)
        fields["prompt_ids"][at] += 1
        return rebuilt(fields), "prompt", {"token": at, "turn": None}
    if what == "sampled" and turn is not None:
        at = rng.randrange(record.turns[turn].start, record.turns[turn].end)
        fields["response_ids"][at - shift] += 1
        return rebuilt(fields), "sampled", {"token": at, "turn": turn}
    if what == "delta" and (
        deltas := [i for i, flag in enumerate(record.response_mask) if not flag]
    ):
        at = rng.choice(deltas)
        fields["response_ids"][at] += 1
        return rebuilt(fields), "delta", {"token": at + shift}
    if what == "logprob" and turn is not None:
        at = rng.randrange(record.turns[turn].start, record.turns[turn].end)
        fields["response_logprobs"][at - shift] -= 1e-7
        return rebuilt(fields), "logprob", {"token": at, "turn": turn}
    if what == "turn" and turn is not None:
        fields["turns"][turn]["weight_version"] = "other"
        return rebuilt(fields), "turn", {"turn": turn, "name": "weight_version"}
    if what == "call" and line is not None:
        fields["tool_calls"][line]["arguments"] = {"something": "else"}
        return rebuilt(fields), "call", {"call_id": record.tool_calls[line].call_id}
    if what == "answer" and line is not None:
        fields["tool_calls"][line]["response"] = "something else"
        return rebuilt(fields), "answer", {"call_id": record.tool_calls[line].call_id}
    if what == "reward" and line is not None:
        fields["tool_calls"][line]["reward"] = 17.0
        return (
            rebuilt(fields),
            "answer",
            {"call_id": record.tool_calls[line].call_id, "replayed": {"reward": 17.0}},
        )
    if what == "end":
        fields["stop_reason"] = "stop" if record.stop_reason != "stop" else "length"
        return rebuilt(fields), "end", {}
    if what == "message" and ids:
        fields["messages"][-1]["content"] += " "
        return rebuilt(fields), "record", {"name": "messages"}
    name = rng.choice(
        [
            "reward_parts",
            "ground_truth",
            "extra",
            "engine",
            "sampling",
            "error",
            "segments",
            "response_mask",
        ]
    )
    fields[name] = (
        [["prompt", 0, 1]]
        if name == "segments"
        else [2]
        if name == "response_mask"
        else {"other": 1.5}
    )
    return rebuilt(fields), "record", {"name": name}


def rebuilt(fields: dict[str, Any]) -> Trajectory:
    return Trajectory.from_record(fields)


async def test_whatever_is_changed_is_named_with_its_place(smollm2: ChatTemplate) -> None:
    scope = Scope(live_model=False, live_tools=False, decode=smollm2.decode)
    rng = random.Random(4)
    kinds: Counter[str] = Counter()
    records = [record for _, record in await worlds(smollm2, 100)]
    for _ in range(1000):
        record = rng.choice(records)
        if (change := changed(record, rng)) is None:
            continue
        other, kind, place = change
        found = compare_records(record, other, scope)
        assert isinstance(found, Divergence)
        assert (found.kind, {name: getattr(found, name) for name in place}) == (kind, place)
        kinds[kind] += 1
    assert set(kinds) == {
        "prompt",
        "sampled",
        "delta",
        "logprob",
        "turn",
        "call",
        "answer",
        "end",
        "record",
    }
