"""Conversations interrupted at every kind of place and resumed: no token is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.engines.engine import Generation, Interrupted, SamplingParams
from agent.errors import EngineError
from agent.loop.batch import run_tasks
from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.loop.users import Interactions
from agent.replay.continuation import continued, continuing
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding
from conversations.checks.record import check_line
from conversations.errors import TemplateError
from conversations.run.store import UNFINISHED, RunFolder, read_trajectories
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.agent.loop.test_users import patient
from tests.helpers import Toy, call, logprobs, runtime, task
from tools.base import BackendError

SCRIPT = (
    call("toy", do="say", text="one"),
    call("toy", do="say", text="two") + call("toy", do="say", text="three"),
    "It is 42, I think.",
)


class Model:
    """Says the turns of SCRIPT; `cut` is (turn, tokens) at which it waits to be interrupted.

    With the rest of a turn still to be said it goes on from the last token, as a model does.
    """

    def __init__(
        self, template: ChatTemplate, version: str, cut: tuple[int, int] | None = None
    ) -> None:
        self.template = template
        self.version = version
        self.cut = cut
        self.waiting = asyncio.Event()
        self.prompts: list[list[int]] = []

    def describe(self) -> dict[str, Any]:
        return {"name": "model", "version": self.version}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        self.prompts.append(list(prompt_ids))
        text = self.template.decode(prompt_ids)
        turn = text.count("<|im_start|>assistant\n") - 1
        ids = [*self.template.encode(SCRIPT[min(turn, 2)]), self.template.end_id]
        begun = self.template.encode(text.rpartition("<|im_start|>assistant\n")[2])
        rest = ids[len(begun) :][: sampling["max_new_tokens"]]
        if self.cut and self.cut[0] == turn:
            self.waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not (told := rest[: self.cut[1]]):
                    raise
                raise Interrupted(self._generation(told, "abort")) from None
        return self._generation(rest, "stop" if rest[-1] == self.template.end_id else "length")

    def _generation(self, ids: list[int], reason: str) -> Generation:
        return Generation(
            ids,
            logprobs(ids, len(ids)),
            reason,
            queue_s=0.5,
            engine_s=1.0,
            weight_version=self.version,
        )

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


def shared(template: ChatTemplate, model: Model, toy: Toy, **fields: Any) -> Runtime:
    return runtime(template, model, [toy], **fields)


async def cut_off(conversation: Conversation, ready: Callable[[], bool]) -> Trajectory:
    running = asyncio.create_task(converse(conversation))
    async with asyncio.timeout(20):
        while not ready():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return Trajectory.from_line(trajectory_of(conversation).to_line())


async def go_on(record: Trajectory, runtime: Runtime, the_task: Task | None = None) -> Trajectory:
    conversation = continued(the_task or task(), 0, record, runtime)
    assert conversation.before is record
    await converse(conversation)
    return Trajectory.from_line(trajectory_of(conversation).to_line())


def comparable(record: Trajectory) -> dict[str, Any]:
    """What a conversation that was never cut off has in common with one that was."""
    fields = dataclasses.asdict(record)
    for key in ("started_at", "wall_s", "engine", "warnings", "response_logprobs"):
        fields.pop(key)
    fields["turns"] = [
        (turn["start"], turn["end"], turn["finish_reason"], turn["prompt_tokens"])
        for turn in fields["turns"]
    ]
    for line in fields["tool_calls"]:
        line.update(
            queue_s=0, run_s=0, attempts=[attempt["status"] for attempt in line["attempts"]]
        )
    return fields


async def undisturbed(template: ChatTemplate) -> Trajectory:
    conversation = Conversation(task(), 0, shared(template, Model(template, "v1"), Toy()))
    await converse(conversation)
    return Trajectory.from_line(trajectory_of(conversation).to_line())


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 7])
async def test_cut_off_within_or_before_any_turn(
    template: ChatTemplate, turn: int, tokens: int
) -> None:
    model, toy = Model(template, "v1", (turn, tokens)), Toy()
    record = await cut_off(
        Conversation(task(), 0, shared(template, model, toy)), model.waiting.is_set
    )
    assert (record.stop_reason, record.num_turns) == ("cancelled", turn + bool(tokens))
    if not record.turns:
        assert isinstance(continued(task(), 0, record, shared(template, model, toy)), Conversation)
        return
    before = record.prompt_ids + record.response_ids
    other = Model(template, "v2")
    whole = await go_on(record, shared(template, other, Toy()))
    assert (whole.prompt_ids + whole.response_ids)[: len(before)] == before
    assert whole.response_logprobs[: len(record.response_logprobs)] == record.response_logprobs
    assert other.prompts[0] == before  # a turn that was begun goes on from its last token
    assert comparable(whole) == comparable(await undisturbed(template))
    versions = [(each.weight_version, each.resumed) for each in whole.turns]
    begun = whole.turns[turn].start + tokens
    assert versions == [("v1", None)] * turn + [
        ("v1", [[begun, "v2"]]) if tokens else ("v2", None)
    ] + [("v2", None)] * (2 - turn)


async def test_cut_off_while_tools_run_the_calls_are_made_again(template: ChatTemplate) -> None:
    toy = Toy()
    hanging = [call("toy", do="say", text="one") + call("toy", do="hang"), "Done."]
    conversation = Conversation(task(), 0, shared(template, says_all(template, hanging), toy))
    record = await cut_off(
        conversation, lambda: toy.hanging.is_set() and conversation.ledger[0].status == "ok"
    )
    assert [line.status for line in record.tool_calls] == ["ok", "cancelled"]
    later = Toy()
    later.hanging.set()
    kinder = shared(template, says_all(template, hanging), later, deadline_s=None)
    again = continued(task(), 0, record, kinder)
    running = asyncio.create_task(converse(again))
    async with asyncio.timeout(20):
        while later.count("execute") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert later.count("execute") == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert trajectory_of(again).response_ids == record.response_ids


def says_all(template: ChatTemplate, turns: list[str]) -> Any:
    model = Model(template, "v1")

    async def generate(
        prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        turn = template.decode(prompt_ids).count("<|im_start|>assistant\n") - 1
        return model._generation([*template.encode(turns[turn]), template.end_id], "stop")

    model.generate = generate  # type: ignore[method-assign]
    return model


async def test_tools_are_brought_into_the_state_they_were_in(smollm2: ChatTemplate) -> None:
    model = Model(smollm2, "v1", (2, 3))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )
    later = Toy()
    whole = await go_on(record, shared(smollm2, Model(smollm2, "v2"), later))
    assert later.count("execute") == 3
    assert later.count("create") == later.count("released") == 1
    assert [line.call_id for line in whole.tool_calls] == ["call_0_0", "call_1_0", "call_1_1"]
    assert whole.tool_calls == record.tool_calls  # what they answered then stands


async def test_a_user_is_asked_again_for_what_it_has_said(smollm2: ChatTemplate) -> None:
    def runtime_of(model: Model, interactions: Interactions) -> Runtime:
        return dataclasses.replace(shared(smollm2, model, Toy()), interactions=interactions)

    the_task = task(
        "t",
        interaction_kwargs={"name": "patient", "who": "Ann"},
        extra={"interaction_kwargs": {"name": "patient", "who": "Ann"}},
    )
    first, _ = patient("generate hangs", timeout_s=60)
    turns = ["It is 41.", "It is 42."]
    conversation = Conversation(the_task, 0, runtime_of(says_all(smollm2, turns), first))
    record = await cut_off(conversation, lambda: len(conversation.turns) == 1)
    second, user = patient()
    whole = await go_on(record, runtime_of(says_all(smollm2, turns), second), the_task)
    assert (whole.num_turns, whole.reward_parts) == (
        2,
        {"user_turn_rewards": [0.0, 1.0]}
        | {k: v for k, v in whole.reward_parts.items() if k == "toy"},
    )
    assert [step for step, _ in user.log] == ["start", "asked", "asked", "finalize"]


async def test_a_user_who_answers_otherwise_when_asked_again_is_noted(
    smollm2: ChatTemplate,
) -> None:
    the_task = task(
        "t",
        interaction_kwargs={"name": "patient", "who": "Ann"},
        extra={"interaction_kwargs": {"name": "patient", "who": "Ann"}},
    )
    turns = ["It is 41.", "It is 40.", "It is 42."]
    (first, one), (second, other) = patient(timeout_s=60), patient()
    conversation = Conversation(
        the_task,
        0,
        dataclasses.replace(shared(smollm2, says_all(smollm2, turns), Toy()), interactions=first),
    )
    answer = one.generate_response

    async def answers_once(*args: Any, **kwargs: Any) -> tuple[bool, Any, Any, dict[str, Any]]:
        if len(conversation.turns) == 2:
            await asyncio.Event().wait()
        return await answer(*args, **kwargs)

    one.generate_response = answers_once  # type: ignore[method-assign]
    record = await cut_off(conversation, lambda: len(conversation.turns) == 2)
    ask = other.generate_response
    other.generate_response = lambda *args, **kwargs: ask(*args, **{**kwargs, "who": "Eve"})  # type: ignore[method-assign]
    whole = await go_on(
        record,
        dataclasses.replace(shared(smollm2, says_all(smollm2, turns), Toy()), interactions=second),
        the_task,
    )
    assert [message["content"] for message in whole.messages if message["role"] == "user"][1:] == [
        "again, Ann",
        "again, Eve",
    ]
    assert "user_differs" in [warning.kind for warning in whole.warnings]


async def test_budgets_count_what_was_sampled_before(smollm2: ChatTemplate) -> None:
    model = Model(smollm2, "v1", (0, 5))
    limits = {"max_tokens": 12}
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy(), **limits)), model.waiting.is_set
    )
    whole = await go_on(record, shared(smollm2, Model(smollm2, "v2"), Toy(), **limits))
    assert whole.turns[0].end - whole.turns[0].start == 12
    assert whole.stop_reason == "length"


async def test_another_prompt_begins_anew(smollm2: ChatTemplate) -> None:
    model = Model(smollm2, "v1", (1, 5))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )
    other = shared(smollm2, Model(smollm2, "v2"), Toy("other"))
    assert continued(task(), 0, record, other).before is None


async def test_a_batch_stopped_and_gone_on_with(smollm2: ChatTemplate, tmp_path: Path) -> None:
    """30 conversations, each interrupted within its second turn, resumed from the run folder."""
    tasks = [task(f"t{number}") for number in range(30)]
    model = Model(smollm2, "v1", (1, 4))
    with RunFolder.create(tmp_path, {}) as store:
        running = asyncio.create_task(run_tasks(tasks, shared(smollm2, model, Toy()), store=store))
        async with asyncio.timeout(20):
            while len(model.prompts) < 60:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    with RunFolder.resume(tmp_path, {}) as store:
        assert len(store.unfinished) == 30
        runtime = shared(smollm2, Model(smollm2, "v2"), Toy())
        make = continuing(runtime, store.unfinished)
        await run_tasks(tasks, runtime, make=make, store=store)
    records = list(read_trajectories(tmp_path))
    assert sorted(record.task_id for record in records) == sorted(one.id for one in tasks)
    expected = (await undisturbed(smollm2)).response_ids
    assert all(record.response_ids == expected for record in records)
    assert all(
        [turn.resumed is not None for turn in record.turns] == [False, True, False]
        for record in records
    )
    assert (tmp_path / UNFINISHED).read_bytes() == b""
    assert all(
        json.loads(line)["turns"][1]["resumed"][0][1] == "v2"
        for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()
    )


# --------------------------------------------------------- what may go wrong between the two halves


async def test_cut_off_again_while_tools_are_brought_back_nothing_is_lost(
    smollm2: ChatTemplate,
) -> None:
    model = Model(smollm2, "v1", (1, 4))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )
    slow = Toy(create="hang")
    again = continued(task(), 0, record, shared(smollm2, Model(smollm2, "v2"), slow))
    assert await cut_off(again, slow.hanging.is_set) == record


async def test_cut_off_twice_says_so_twice(smollm2: ChatTemplate) -> None:
    first, second = Model(smollm2, "v1", (0, 3)), Model(smollm2, "v2", (1, 2))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, first, Toy())), first.waiting.is_set
    )
    record = await cut_off(
        continued(task(), 0, record, shared(smollm2, second, Toy())), second.waiting.is_set
    )
    idle = Model(smollm2, "v2", (1, 0))  # cut off before it said a word more
    record = await cut_off(
        continued(task(), 0, record, shared(smollm2, idle, Toy())), idle.waiting.is_set
    )
    whole = await go_on(record, shared(smollm2, Model(smollm2, "v3"), Toy()))
    places = [turn.start + tokens for turn, tokens in zip(whole.turns, (3, 2), strict=False)]
    assert [warning.kind for warning in whole.warnings] == ["resumed", "resumed"]
    for warning, place in zip(whole.warnings, places, strict=True):
        assert f"token {place}," in warning.text
    assert [turn.resumed for turn in whole.turns] == [
        [[places[0], "v2"]],
        [[places[1], "v3"]],
        None,
    ]
    assert comparable(whole) == comparable(await undisturbed(smollm2))


async def test_a_turn_that_was_whole_when_it_was_aborted_is_answered(
    template: ChatTemplate,
) -> None:
    """An engine may have come to the end token before it hears of the abort."""
    model = Model(template, "v1", (1, 10_000))
    record = await cut_off(
        Conversation(task(), 0, shared(template, model, Toy())), model.waiting.is_set
    )
    assert (record.turns[-1].finish_reason, record.response_ids[-1]) == ("abort", template.end_id)
    later = Model(template, "v2")
    assert comparable(await go_on(record, shared(template, later, Toy()))) == comparable(
        await undisturbed(template)
    )
    assert len(later.prompts) == 1


async def test_a_turn_that_had_used_its_budget_when_it_was_aborted_ends_the_conversation(
    smollm2: ChatTemplate,
) -> None:
    model, limits = Model(smollm2, "v1", (0, 9)), {"max_tokens": 9}
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy(), **limits)), model.waiting.is_set
    )
    whole = await go_on(record, shared(smollm2, Model(smollm2, "v2"), Toy(), **limits))
    assert (whole.stop_reason, whole.turns[0].finish_reason) == ("length", "length")
    assert {line.status for line in whole.tool_calls} <= {"malformed", "rejected"}
    assert whole.response_ids == record.response_ids
    assert not defects(whole, smollm2)


async def test_cut_off_while_the_reward_is_made_no_turn_is_sampled_again(
    smollm2: ChatTemplate,
) -> None:
    judge = Toy(calc_reward="hang")
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, Model(smollm2, "v1"), judge)), judge.hanging.is_set
    )
    later = Model(smollm2, "v2")
    whole = await go_on(record, shared(smollm2, later, Toy()))
    assert not later.prompts
    assert comparable(whole) == comparable(await undisturbed(smollm2))


async def test_a_tool_that_cannot_be_brought_back_is_a_failure_of_infrastructure(
    smollm2: ChatTemplate,
) -> None:
    model = Model(smollm2, "v1", (1, 4))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )
    later = Model(smollm2, "v2")
    whole = await go_on(record, shared(smollm2, later, Gone()))
    assert (whole.infra_error, whole.reward, later.prompts) == (True, None, [])
    assert "call_0_0 could not be made again" in str(whole.error)
    assert not defects(whole, smollm2)


async def test_the_deadline_is_of_all_that_it_ran(smollm2: ChatTemplate) -> None:
    model, limits = Model(smollm2, "v1", (1, 4)), {"deadline_s": 60.0}
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy(), **limits)), model.waiting.is_set
    )
    record = dataclasses.replace(record, wall_s=59.9)
    stuck = Model(smollm2, "v2", (2, 3))
    whole = await go_on(record, shared(smollm2, stuck, Toy(), **limits))
    assert (whole.stop_reason, whole.infra_error, whole.num_turns) == ("deadline", False, 3)
    assert whole.wall_s >= 60
    assert not defects(whole, smollm2)


async def test_a_deadline_while_tools_are_brought_back_keeps_what_was_sampled(
    smollm2: ChatTemplate,
) -> None:
    model, limits = Model(smollm2, "v1", (1, 4)), {"deadline_s": 60.0}
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy(), **limits)), model.waiting.is_set
    )
    late = dataclasses.replace(record, wall_s=59.9)
    whole = await go_on(late, shared(smollm2, Model(smollm2, "v2"), Toy(create="hang"), **limits))
    assert (whole.stop_reason, whole.infra_error, whole.reward) == ("deadline", True, None)
    assert whole.error == "its tools were not brought back before its deadline"
    assert (whole.response_ids, whole.turns, whole.messages) == (
        record.response_ids,
        record.turns,
        record.messages,
    )
    assert not defects(whole, smollm2)


async def test_an_engine_that_fails_in_the_second_half_leaves_a_record_in_order(
    smollm2: ChatTemplate,
) -> None:
    model = Model(smollm2, "v1", (1, 4))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )

    async def generate(*args: Any, **kwargs: Any) -> Generation:
        raise EngineError("it is gone")

    model.generate = generate  # type: ignore[method-assign]
    whole = await go_on(record, shared(smollm2, model, Toy()))
    assert (whole.stop_reason, whole.infra_error, whole.response_ids) == (
        "engine_error",
        True,
        record.response_ids,
    )
    assert not defects(whole, smollm2)


async def test_where_infrastructure_failed_already_it_begins_anew(smollm2: ChatTemplate) -> None:
    model = Model(smollm2, "v1", (1, 4))
    record = await cut_off(
        Conversation(task(), 0, shared(smollm2, model, Gone())), model.waiting.is_set
    )
    assert [line.status for line in record.tool_calls][:1] == ["backend_error"]
    other = shared(smollm2, Model(smollm2, "v2"), Toy())
    assert continued(task(), 0, record, other).before is None


async def test_a_lower_limit_on_invalid_calls_ends_a_resumed_conversation(
    smollm2: ChatTemplate,
) -> None:
    """The record is beyond the limit already, so the limit is never met exactly."""
    model, waiting = says_all(smollm2, [call("nobody")] * 9), asyncio.Event()
    sample = model.generate

    async def waits(prompt_ids: Sequence[int], *args: Any, **kwargs: Any) -> Generation:
        if smollm2.decode(prompt_ids).count("<|im_start|>assistant\n") == 4:
            waiting.set()
            await asyncio.Event().wait()
        generation: Generation = await sample(prompt_ids, *args, **kwargs)
        return generation

    model.generate = waits
    record = await cut_off(Conversation(task(), 0, shared(smollm2, model, Toy())), waiting.is_set)
    assert [line.status for line in record.tool_calls] == ["unknown_tool"] * 3
    model.generate = sample
    whole = await go_on(record, shared(smollm2, model, Toy(), max_consecutive_invalid_calls=2))
    assert (whole.stop_reason, whole.num_turns) == ("invalid_tool_calls", 4)


async def test_a_record_that_cannot_be_restored_costs_its_own_conversation_alone(
    smollm2: ChatTemplate,
) -> None:
    """The chat template of today refuses its messages, or its tool kwargs are no tool kwargs."""
    model = Model(smollm2, "v1", (1, 4))
    record = await cut_off(
        Conversation(task("t1"), 0, shared(smollm2, model, Toy())), model.waiting.is_set
    )

    class Refusing(ChatTemplate):
        def prompt(self, *args: Any, **kwargs: Any) -> Any:
            raise TemplateError("the chat template refuses the messages")

    refusing = Refusing(smollm2.tokenizer)
    odd = dataclasses.replace(record, extra={"tools_kwargs": {"toy": {"unknown_kwargs": {}}}})
    for template, before, stop_reason in (
        (refusing, record, "engine_error"),
        (smollm2, odd, "stop"),
    ):
        runtime = shared(template, Model(template, "v2"), Toy())
        ended: list[Trajectory] = []
        await run_tasks(
            [task("t0"), task("t1"), task("t2")],
            runtime,
            make=continuing(runtime, {("t1", 0): before}),
            on_done=ended.append,
        )
        assert [one.stop_reason for one in ended] == [stop_reason] * 3
        assert not any(one.infra_error for one in ended)


class Gone(Toy):
    """Its backend answers no call."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        raise BackendError("gone")


def defects(record: Trajectory, template: ChatTemplate) -> list[Finding]:
    return check_line(record.to_line().encode() + b"\n", RunFacts(template=template)).findings
