"""A tool asks its conversation's model: a branch of the record, within its limits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from agent.commands.run_work import RunRequest, prepare_run
from agent.config.config import load_config
from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.loop.asides import Asides, CallModel
from agent.loop.batch import run_tasks
from agent.replay.compare import Scope, compare_records
from agent.replay.request import ReplayRequest
from agent.replay.runner import replay_run
from conversations.branches import is_aside, rows
from conversations.open_run import open_run
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from conversations.verify import verify_run
from tests import virtual_time
from tests.crossings.features import Adviser, open_store, with_asking_tool
from tests.crossings.world import DOUBT, FAULTS, OPINION, OPINIONS, AskingDesk, World
from tests.helpers import logprobs, runtime
from tools.base import AskModel, BackendError, ToolError, ToolResponse


class OddDesk(AskingDesk):
    """Asks what `does` says, and answers with what it was told."""

    does: Callable[[AskModel], Any]
    kept: AskModel | None = None
    later: ClassVar[list[asyncio.Task[str]]] = []

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(str(await type(self).does(kwargs["model"]))), None, {}


def run(
    world: World,
    does: Callable[[AskModel], Any] | None = None,
    model: Adviser | None = None,
    **limits: Any,
) -> Trajectory:
    """The record of the world's conversation, which verifies, each sampled token in one row."""
    world.write_files()
    with_asking_tool(world)
    if does is not None:
        OddDesk.does = staticmethod(does)
        text = world.tools_path.read_text()
        odd = text.replace("tests.crossings.world.AskingDesk", f"{__name__}.OddDesk")
        world.tools_path.write_text(odd)

    async def both() -> None:
        runtime = world.runtime(model or Adviser(world.template))
        runtime = replace(runtime, settings=replace(runtime.settings, **limits))
        with open_store(world) as store:
            store.note("config", limited(world.manifest()["config"], **limits))
            await run_tasks(world.tasks(), runtime, store=store)
            store.close({})

    virtual_time.run(both())
    defects: list[Any] = []
    verify_run(world.out, on_defect=defects.append)
    assert defects == []
    (record,) = open_run(world.out)
    found = list(rows(record))
    sampled = [turn for part in (record, *record.branches) for turn in part.turns]
    assert sum(sum(row.trajectory.response_mask) for row in found) == sum(
        turn.end - turn.start for turn in sampled
    )
    return record


def limited(config: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """The run's config with the limits of `LoopSettings`."""
    rollout = config["rollout"]
    multi_turn = {**rollout["multi_turn"], "max_assistant_turns": limits.get("max_turns")}
    length = limits.get("response_length", rollout["response_length"])
    return {**config, "rollout": {**rollout, "response_length": length, "multi_turn": multi_turn}}


@pytest.fixture
def world(smollm2: ChatTemplate, tmp_path: Path) -> World:
    return World(FAULTS["nothing"], smollm2, tmp_path, with_user=False)


async def opinion(model: AskModel) -> str:
    return await model.ask([{"role": "user", "content": OPINION}])


def test_each_call_that_asks_is_a_branch_beside_the_conversation(world: World) -> None:
    record = run(world)
    assert [len(record.turns), record.stop_reason, record.reward] == [3, "stop", 1.0]
    assert [branch.client for branch in record.branches] == [
        {"tool": "desk", "call": f"call_{turn}_0", "branch": 0} for turn in (0, 1)
    ]
    for branch in record.branches:
        assert (branch.parent, branch.reason, branch.tools) == (None, "new", [])
        said = [message["content"] for message in branch.messages]
        assert said[1:] == [OPINIONS[0], DOUBT, OPINIONS[1]]
        assert [turn.prompt_tokens for turn in branch.turns] == [t.start for t in branch.turns]
        assert [kind for kind, _, _ in branch.segments].count("sampled") == 2


def test_a_replay_with_recorded_tools_plays_it_and_today_s_tools_ask_again(world: World) -> None:
    parent = replace(world, folder=world.folder / "parent")
    parent.folder.mkdir()
    recorded = run(parent)

    def replayed(name: str, **request: Any) -> Trajectory:
        out = world.folder / name
        report: dict[str, Any]
        asked = ReplayRequest(parent.out, out, **request)
        code, report = replay_run(asked, Console(file=io.StringIO()))
        assert (code, report["outcomes"]["identical"]) == (0, 1), report
        (record,) = open_run(out)
        return record

    tools = {"tools": "live", "tools_config": str(parent.tools_path), "trust_tools": True}
    for again in (replayed("recorded"), replayed("asked", **tools)):
        assert again.branches == recorded.branches


def test_a_live_model_beside_recorded_tools_need_not_be_asked(world: World) -> None:
    record = run(world)
    without = replace(record, branches=[])
    scopes = [Scope(live_model, False, world.template.decode) for live_model in (True, False)]
    live, recorded = (compare_records(record, without, scope) for scope in scopes)
    assert live is None
    assert recorded is not None
    assert (recorded.kind, recorded.recorded, recorded.replayed) == ("end", 2, 0)


class Failing(Adviser):
    """Fails when a tool asks it for the second time in a chat."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        if DOUBT in self.template.decode(prompt_ids):
            raise EngineError("the engine answered with status 503")
        return await super().generate(prompt_ids, sampling, request_id=request_id, **given)


def test_an_engine_that_fails_for_a_tool_is_infrastructure(world: World) -> None:
    record = run(world, model=Failing(world.template))
    assert [line.status for line in record.tool_calls] == ["backend_error"] * 2
    assert (record.infra_error, record.reward) == (True, None)
    assert [len(branch.turns) for branch in record.branches] == [1, 1]


class Slow(Adviser):
    """Never ends what a tool asks."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        if OPINION in self.template.decode(prompt_ids):
            await asyncio.Event().wait()
        return await super().generate(prompt_ids, sampling, request_id=request_id, **given)


def test_the_deadline_of_the_conversation_ends_what_a_tool_asks(world: World) -> None:
    record = run(world, model=Slow(world.template), deadline_s=2.0)
    assert (record.stop_reason, record.branches) == ("deadline", [])
    assert [line.status for line in record.tool_calls] == ["cancelled"]


class Cut(Adviser):
    """Ends its turns where it is told to."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        made = await super().generate(prompt_ids, sampling, request_id=request_id, **given)
        room = sampling["max_new_tokens"]
        if len(made.token_ids) <= room:
            return made
        return Generation(made.token_ids[:room], made.logprobs[:room], "length")


def test_what_a_tool_asks_counts_as_turns_of_the_conversation(world: World) -> None:
    record = run(world, opinion, max_turns=2)
    assert (record.stop_reason, len(record.turns), len(record.branches)) == ("max_turns", 1, 1)


def test_what_tools_ask_at_once_never_takes_more_than_is_left(world: World) -> None:
    call, answer = (
        len(world.template.encode(text)) + 1 for text in (world.script.calls[0], OPINIONS[0])
    )
    limit = call + answer + 2  # one answer, and a part of another
    record = run(world, twice, Cut(world.template), response_length=limit)
    assert (record.stop_reason, len(record.branches)) == ("length", 2)
    sampled = sum(sum(part.response_mask) for part in (record, *record.branches))
    assert sampled == limit


async def twice(model: AskModel) -> str:
    """Two chats at once."""
    return " ".join(await asyncio.gather(opinion(model), opinion(model)))


async def alien(model: AskModel) -> str:
    return await model.ask([{"role": "alien", "content": "?"}])


async def nothing_new(model: AskModel) -> str:
    chat = model.chat([{"role": "user", "content": OPINION}])
    await chat.answer()
    return await chat.answer()


async def too_long(model: AskModel) -> str:
    return await model.ask([{"role": "user", "content": OPINION * 4000}])


async def too_late(model: AskModel) -> str:
    """Each call asks with the model of the one before."""
    OddDesk.kept, before = model, OddDesk.kept
    return await opinion(before or model)


@pytest.mark.parametrize(
    ("does", "status", "word", "branches"),
    [
        (twice, "ok", " ".join([OPINIONS[0]] * 2), 4),
        (alien, "tool_error", "asked", 0),
        (nothing_new, "tool_error", "say something", 2),
        (too_long, "tool_error", "too long", 0),
        (too_late, "tool_error", "while the call runs", 1),
    ],
)
def test_what_cannot_be_asked_is_an_answer_for_the_model(
    does: Callable[[AskModel], Any], status: str, word: str, branches: int, world: World
) -> None:
    OddDesk.kept = None
    record = run(world, does)
    assert record.stop_reason == "stop"
    assert record.tool_calls[-1].status == status
    assert word in (record.tool_calls[-1].response or "")
    assert len(record.branches) == branches
    assert all(map(is_aside, record.branches))


def asking(template: ChatTemplate, engine: Any, **limits: Any) -> CallModel:
    """The model for a call of a conversation's first turn."""
    asides = Asides(runtime(template, engine, **limits), [])
    asides.open(branch=0, used=0, turns=0)
    return CallModel(asides, "desk", "call_0_0")


async def test_what_was_never_sampled_uses_no_turn(smollm2: ChatTemplate) -> None:
    ids = smollm2.encode("Yes.")
    answers = [EngineError("503"), Generation(ids, logprobs(ids), "length")]

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        if isinstance(answer := answers.pop(0), EngineError):
            raise answer
        return answer

    model = asking(smollm2, ScriptedEngine(respond), max_turns=1)
    for _ in range(2):
        with pytest.raises(ToolError, match="too long"):
            await too_long(model)
    with pytest.raises(BackendError, match="503"):
        await opinion(model)
    assert await opinion(model) == "Yes."
    with pytest.raises(ToolError, match="turns"):
        await opinion(model)
    assert [len(branch.turns) for branch in model.asides.sequences()] == [1]


class Stubborn:
    """Answers only when it is aborted, and `with_answer` even then."""

    def __init__(self, template: ChatTemplate, *, with_answer: bool) -> None:
        ids = template.encode("Late.")
        self.answer = Generation(ids, logprobs(ids), "length")
        self.with_answer, self.aborted = with_answer, False

    async def generate(self, *given: Any, **more: Any) -> Generation:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.aborted = True
            if not self.with_answer:
                raise
        return self.answer


@pytest.mark.parametrize("with_answer", [False, True])
async def test_a_turn_that_outlives_its_call_is_cut_off(
    with_answer: bool, smollm2: ChatTemplate
) -> None:
    engine = Stubborn(smollm2, with_answer=with_answer)
    model = asking(smollm2, engine, max_turns=1)
    later = [asyncio.create_task(opinion(model)) for _ in range(2)]
    await asyncio.sleep(0.01)
    model.close()
    for one in await asyncio.gather(*later, return_exceptions=True):
        assert isinstance(one, ToolError)
    allowance = model.asides.allowance
    assert (engine.aborted, model.asides.sequences(), model.answering) == (True, [], set())
    assert (allowance.turns, allowance.budget.used, allowance.budget.reserved) == (1, 0, 0)


class Late(Adviser):
    """Answers a tool after 10 s; its own turns take longer."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        await asyncio.sleep(10.0 if OPINION in self.template.decode(prompt_ids) else 30.0)
        return await super().generate(prompt_ids, sampling, request_id=request_id, **given)


async def in_the_background(model: AskModel) -> str:
    OddDesk.later.append(asyncio.create_task(opinion(model)))
    await asyncio.sleep(1.0)
    return "later"


def test_a_tool_that_returns_before_its_answer_has_no_branch(world: World) -> None:
    OddDesk.later = []
    record = run(world, in_the_background, Late(world.template))
    assert (record.stop_reason, record.branches) == ("stop", [])
    assert [line.status for line in record.tool_calls] == ["ok", "ok"]
    assert all(isinstance(one.exception(), ToolError) for one in OddDesk.later)


@pytest.mark.parametrize(
    ("desk", "max_tokens", "notes"),
    [("AskingDesk", "null", 1), ("AskingDesk", "1000", 0), ("Desk", "null", 0)],
)
def test_a_run_whose_turns_may_wait_for_each_other_says_so(
    desk: str, max_tokens: str, notes: int, world: World
) -> None:
    world.write_files()
    text = world.tools_path.read_text()
    world.tools_path.write_text(text.replace("world.Desk", f"world.{desk}"))
    tasks = world.folder / "tasks.jsonl"
    tasks.write_text('{"prompt": "?"}')
    words = {
        "turntrace.max_tokens": max_tokens,
        "multi_turn.enable": "true",
        "multi_turn.tool_config_path": world.tools_path,
    }
    config = load_config(None, [f"rollout.{key}={value}" for key, value in words.items()])
    plan = prepare_run(RunRequest(tasks, world.out, config, None, False, False, False, []))
    assert sum("turntrace.max_tokens" in note for note in plan.notes) == notes


def test_a_branch_that_no_call_asked_for_is_a_defect(world: World) -> None:
    record = run(world)
    forged = replace(record.branches[0], client={"tool": "desk", "call": "call_7_0", "branch": 0})
    changed = replace(record, branches=[forged, *record.branches[1:]])
    (world.out / "trajectories.jsonl").write_text(changed.to_line() + "\n")
    defects: list[Any] = []
    verify_run(world.out, on_defect=defects.append)
    assert any("call_7_0" in str(defect) for defect in defects)
