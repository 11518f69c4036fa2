"""One conversation: every stop reason, every budget, and the record after each kind of end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from agent.engines.engine import Generation, Interrupted, SamplingParams
from agent.engines.scripted import ScriptedEngine, recorded
from agent.errors import EndConversation, EngineError
from agent.loop.boundary import END_S
from agent.loop.conversation import Conversation
from agent.loop.loop import converse
from agent.loop.record import trajectory_of
from conversations.errors import TemplateError
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests import virtual_time
from tests.conversations.templates import family
from tests.helpers import (
    QUESTION,
    Toy,
    call,
    logprobs,
    qwen_template,
    run_one,
    runtime,
    says,
    settings,
    task,
)


def generation(ids: list[int], finish_reason: str = "stop", **fields: Any) -> Generation:
    return Generation(ids, logprobs(ids), finish_reason, **fields)


def text_of(template: ChatTemplate, record: Trajectory, *kinds: str) -> list[str]:
    ids = record.prompt_ids + record.response_ids
    return [
        template.decode(ids[start:end]) for kind, start, end in record.segments if kind in kinds
    ]


def seen(engine: ScriptedEngine) -> list[list[int]]:
    """What the engine is given, from now on."""
    inputs: list[list[int]] = []
    generate = engine.generate

    async def watched(prompt_ids: Any, sampling: Any, *, request_id: str) -> Generation:
        inputs.append(list(prompt_ids))
        return await generate(prompt_ids, sampling, request_id=request_id)

    engine.generate = watched  # type: ignore[method-assign]
    return inputs


# ---------------------------------------------------------------------- a whole conversation


async def test_two_calls_and_an_answer(smollm2: ChatTemplate) -> None:
    first = f"Let me see.\n{call('toy', do='reward', text='0.5')}"
    second = f"{call('toy', do='say', text='a')}\n{call('toy', do='say', text='b')}"
    engine = says(smollm2, first, second, "It is 42.")
    inputs = seen(engine)
    record = await run_one(
        runtime(smollm2, engine, [Toy(calc_reward="reward")]),
        task(ground_truth="42", data_source="d", extra={"k": [1]}),
    )

    assert text_of(smollm2, record, "sampled") == [
        f"{first}<|im_end|>",
        f"{second}<|im_end|>",
        "It is 42.<|im_end|>",
    ]
    assert text_of(smollm2, record, "tool") == [
        "<|im_start|>user\n<tool_response>\nrewarded\n</tool_response><|im_end|>\n",
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n",
    ]
    assert text_of(smollm2, record, "template") == ["\n", "<|im_start|>assistant\n"] * 2
    assert [kind for kind, _, _ in record.segments] == [
        "prompt",
        *["sampled", "template", "tool", "template"] * 2,
        "sampled",
    ]

    ids = record.prompt_ids + record.response_ids
    assert [ids[: turn.start] for turn in record.turns] == inputs
    assert [turn.prompt_tokens for turn in record.turns] == [turn.start for turn in record.turns]
    assert sum(record.response_mask) == sum(turn.end - turn.start for turn in record.turns)

    assert [message["role"] for message in record.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert [message.get("raw") for message in record.messages] == [
        None,
        first,
        None,
        second,
        None,
        None,
        "It is 42.",
    ]
    assert [message["content"] for message in record.messages][1:4] == [
        "Let me see.\n",
        "rewarded",
        "\n",
    ]
    assert [
        message.get("tool_call_id") for message in record.messages if message["role"] == "tool"
    ] == ["call_0_0", "call_1_0", "call_1_1"]
    assert [line.call_id for line in record.tool_calls] == ["call_0_0", "call_1_0", "call_1_1"]
    assert [line.reward for line in record.tool_calls] == [0.5, None, None]

    assert (record.stop_reason, record.num_turns, record.infra_error, record.error) == (
        "stop",
        3,
        False,
        None,
    )
    assert (record.reward, record.reward_parts) == (1.0, {"toy": 1.0})
    assert (record.ground_truth, record.data_source, record.extra) == ("42", "d", {"k": [1]})
    assert (record.id, record.task_id, record.sample, record.parent) == ("t-0", "t", 0, None)
    assert record.tools[0]["function"]["name"] == "toy"


async def test_without_tools_a_call_is_text(smollm2: ChatTemplate) -> None:
    record = await run_one(runtime(smollm2, says(smollm2, call("toy", do="say"))))
    assert (record.stop_reason, record.tool_calls, record.tools, record.reward) == (
        "stop",
        [],
        [],
        None,
    )
    assert record.messages[-1]["content"] == call("toy", do="say")


async def test_the_engine_is_told_where_to_stop_and_how_far_to_go(smollm2: ChatTemplate) -> None:
    asked: list[Any] = []

    def respond(prompt_ids: Any, sampling: Any) -> Generation:
        asked.append(dict(sampling))
        return generation(
            [*smollm2.encode(call("toy", do="say") if len(asked) == 1 else "42"), smollm2.end_id]
        )

    record = await run_one(
        runtime(
            smollm2,
            ScriptedEngine(respond),
            [Toy()],
            response_length=100,
            max_tokens=60,
            sampling={"temperature": 0.7, "top_p": 1.0},
        )
    )
    used = record.turns[1].start - len(record.prompt_ids)
    assert asked == [
        {
            "temperature": 0.7,
            "top_p": 1.0,
            "max_new_tokens": room,
            "stop_token_ids": smollm2.stop_token_ids,
        }
        for room in (60, 100 - used)
    ]
    assert record.sampling == {
        "temperature": 0.7,
        "top_p": 1.0,
        "stop_token_ids": smollm2.stop_token_ids,
    }


async def test_what_the_engine_says_of_a_turn_is_kept(smollm2: ChatTemplate) -> None:
    answer = generation(
        [smollm2.end_id], cached_tokens=3, queue_s=0.25, engine_s=0.5, weight_version="w7"
    )
    (turn,) = (await run_one(runtime(smollm2, says(smollm2, answer)))).turns
    assert (turn.cached_tokens, turn.queue_s, turn.engine_s, turn.weight_version) == (
        3,
        0.25,
        0.5,
        "w7",
    )
    assert turn.prompt_tokens == turn.start


async def test_an_engine_that_saw_other_tokens_than_were_sent_is_an_engine_error(
    smollm2: ChatTemplate,
) -> None:
    record = await run_one(
        runtime(smollm2, says(smollm2, generation([smollm2.end_id], prompt_tokens=7)))
    )
    assert (record.stop_reason, record.num_turns) == ("engine_error", 0)
    assert "7 prompt tokens" in str(record.error)


async def test_work_per_turn_does_not_grow_with_the_conversation(smollm2: ChatTemplate) -> None:
    """Between two calls of the engine, always as many characters are encoded and ids decoded."""

    class Counted(ChatTemplate):
        work = 0

        def encode(self, text: str) -> list[int]:
            self.work += len(text)
            return super().encode(text)

        def encoding(self, text: str) -> Any:
            self.work += len(text)
            return super().encoding(text)

        def decode(self, ids: Any) -> str:
            self.work += len(ids)
            return super().decode(ids)

    template = Counted(smollm2.tokenizer)
    template.require_tools()  # as a run does before its first conversation
    so_far: list[int] = []
    turn = [*smollm2.encode(call("toy", do="say", text="word " * 20)), smollm2.end_id]

    def respond(prompt_ids: Any, sampling: Any) -> Generation:
        so_far.append(template.work)
        return generation(turn)

    record = await run_one(
        runtime(
            template,
            ScriptedEngine(respond),
            [Toy()],
            max_turns=50,
            response_length=50_000,
            max_model_len=100_000,
        )
    )
    assert record.num_turns == 50
    work = {after - before for before, after in pairwise(so_far)}
    assert len(work) == 1
    assert 0 < work.pop() < 500


# ---------------------------------------------------------------------- the end of a turn


async def test_an_exact_fit_is_complete_though_the_engine_says_length(
    smollm2: ChatTemplate,
) -> None:
    ids = [*smollm2.encode("42"), smollm2.end_id]
    record = await run_one(
        runtime(smollm2, says(smollm2, generation(ids, "length")), response_length=len(ids))
    )
    assert (record.stop_reason, record.turns[0].finish_reason, record.messages[-1]["raw"]) == (
        "stop",
        "length",
        "42",
    )


async def test_calls_of_an_exact_fit_are_run(smollm2: ChatTemplate) -> None:
    toy = Toy()
    ids = [*smollm2.encode(call("toy", do="say")), smollm2.end_id]
    record = await run_one(
        runtime(smollm2, says(smollm2, generation(ids, "length"), "42"), [toy], max_tokens=len(ids))
    )
    assert toy.count("execute") == 1
    assert record.stop_reason == "stop"


async def test_calls_of_a_cut_turn_are_never_run(smollm2: ChatTemplate) -> None:
    toy = Toy(calc_reward="reward")
    ids = smollm2.encode(call("toy", do="say") + "<tool_call>{oops</tool_call>" + call("nobody"))
    record = await run_one(runtime(smollm2, says(smollm2, generation(ids, "length")), [toy]))
    assert record.stop_reason == "length"
    assert toy.count("execute") == 0
    assert [line.status for line in record.tool_calls] == ["rejected", "malformed", "rejected"]
    assert all(line.error and not line.attempts for line in record.tool_calls)
    assert record.messages[-1]["role"] == "assistant"
    assert record.reward == 1.0


async def test_a_lacking_end_token_is_appended_by_the_template(smollm2: ChatTemplate) -> None:
    """The engine stopped at another stop token: the turn is complete, its end token not sampled."""
    other = smollm2.encode("<|endoftext|>")
    ids = [*smollm2.encode(call("toy", do="say", text="x")), *other]
    record = await run_one(runtime(smollm2, says(smollm2, ids, "42"), [Toy()]))
    assert (
        text_of(smollm2, record, "sampled")[0] == f"{call('toy', do='say', text='x')}<|endoftext|>"
    )
    assert text_of(smollm2, record, "template")[0] == "<|im_end|>\n"
    assert record.messages[1]["raw"].endswith("<|endoftext|>")
    assert record.stop_reason == "stop"


async def test_thoughts_that_the_generation_prompt_opened() -> None:
    template, toy = family("thinking"), Toy()
    raw = f"{call('toy', do='say')}</think>Yes.{call('toy', do='say')}"
    record = await run_one(runtime(template, says(template, raw, "hm</think>42"), [toy]))
    assert toy.count("execute") == 1
    assert record.messages[1]["reasoning_content"] == call("toy", do="say")
    assert record.messages[1]["content"] == "Yes."


async def test_a_template_that_drops_thoughts_is_warned_about_and_the_sampled_tokens_stay() -> None:
    template = qwen_template("qwen3")
    thought = f"<think>\nhm\n</think>\n\n{call('toy', do='say')}"
    engine = says(template, thought, thought, "42")
    inputs = seen(engine)
    record = await run_one(runtime(template, engine, [Toy()]))
    assert [warning.kind for warning in record.warnings] == ["history_rewritten"]
    assert template.decode(inputs[2]).count("<think>\nhm\n</think>") == 2


async def test_control_tokens_in_a_response_are_warned_about(smollm2: ChatTemplate) -> None:
    record = await run_one(
        runtime(smollm2, says(smollm2, call("toy", do="control"), "42"), [Toy()])
    )
    [warning] = record.warnings
    assert warning.kind == "control_tokens"
    assert all(part in warning.text for part in ("call_0_0", "<|im_end|>, <|im_start|>"))


# ---------------------------------------------------------------------- stop reasons


async def test_a_tool_that_ends_the_conversation(smollm2: ChatTemplate) -> None:
    done = Toy("done", ends_conversation=True, calc_reward="reward")
    record = await run_one(
        runtime(
            smollm2,
            says(smollm2, call("toy", do="say") + call("done", do="say", text="bye")),
            [Toy(), done],
        )
    )
    assert (record.stop_reason, record.reward) == ("tool_stop", 1.0)
    assert [line.response for line in record.tool_calls] == ["", "bye"]
    assert record.messages[-1]["role"] == "assistant"
    assert record.segments[-1][0] == "sampled"


async def test_a_tool_that_would_end_it_but_fails_does_not(smollm2: ChatTemplate) -> None:
    done = Toy("done", ends_conversation=True)
    record = await run_one(
        runtime(smollm2, says(smollm2, call("done", do="tool_error"), "42"), [done])
    )
    assert record.stop_reason == "stop"


async def test_the_last_allowed_turns_calls_are_run_and_rewarded_but_not_answered(
    smollm2: ChatTemplate,
) -> None:
    toy = Toy(calc_reward="reward")
    record = await run_one(
        runtime(
            smollm2,
            says(smollm2, call("toy", do="say"), call("toy", do="reward", text="0.5")),
            [toy],
            max_turns=2,
        )
    )
    assert (record.stop_reason, record.num_turns, record.reward) == ("max_turns", 2, 1.0)
    assert [(line.status, line.reward) for line in record.tool_calls] == [("ok", None), ("ok", 0.5)]
    assert [message["role"] for message in record.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


async def test_an_answer_in_the_last_allowed_turn_is_a_stop(smollm2: ChatTemplate) -> None:
    assert (
        await run_one(runtime(smollm2, says(smollm2, "42"), [Toy()], max_turns=1))
    ).stop_reason == "stop"


async def test_invalid_calls_in_a_row(smollm2: ChatTemplate) -> None:
    bad = "<tool_call>{oops</tool_call>"
    turns = [bad, call("nobody") + call("toy", do="say"), bad + call("toy", do=1), call("nobody")]
    record = await run_one(
        runtime(smollm2, says(smollm2, *turns), [Toy()], max_consecutive_invalid_calls=3)
    )
    assert (record.stop_reason, record.num_turns, record.infra_error) == (
        "invalid_tool_calls",
        4,
        False,
    )
    assert [line.status for line in record.tool_calls] == [
        "malformed",
        "unknown_tool",
        "ok",
        "malformed",
        "invalid_arguments",
        "unknown_tool",
    ]


async def test_no_limit_of_invalid_calls(smollm2: ChatTemplate) -> None:
    record = await run_one(
        runtime(
            smollm2,
            says(smollm2, *[call("nobody")] * 20, "42"),
            [Toy()],
            max_consecutive_invalid_calls=None,
        )
    )
    assert (record.stop_reason, record.num_turns) == ("stop", 21)


async def test_a_prompt_over_its_budget_never_reaches_the_engine(smollm2: ChatTemplate) -> None:
    fits = await run_one(runtime(smollm2, says(smollm2, "42")))
    length = len(fits.prompt_ids)
    assert (
        await run_one(runtime(smollm2, says(smollm2, "42"), prompt_length=length))
    ).stop_reason == "stop"
    assert (
        await run_one(runtime(smollm2, says(smollm2, "4"), max_model_len=length + 2))
    ).stop_reason == "stop"
    for limits in ({"prompt_length": length - 1}, {"max_model_len": length}):
        record = await run_one(runtime(smollm2, says(smollm2), **limits))
        assert (record.stop_reason, record.num_turns, record.turns, record.infra_error) == (
            "prompt_too_long",
            0,
            [],
            False,
        )
        assert (record.prompt_ids, record.response_ids, record.segments) == (
            fits.prompt_ids,
            [],
            [("prompt", 0, length)],
        )


async def test_what_tools_say_when_created_counts_to_the_prompt(smollm2: ChatTemplate) -> None:
    kwargs = {"tools_kwargs": {"toy": {"create_kwargs": {"text": "The board is empty."}}}}
    record = await run_one(runtime(smollm2, says(smollm2, "42"), [Toy()]), task(**kwargs))
    assert text_of(smollm2, record, "tool") == [
        "<|im_start|>user\n<tool_response>\nThe board is empty.\n</tool_response><|im_end|>\n"
    ]
    assert [kind for kind, _, _ in record.segments] == ["prompt", "tool", "prompt", "sampled"]
    assert record.messages[1] == {"role": "tool", "content": "The board is empty.", "name": "toy"}
    toy = Toy(calc_reward="reward")
    long = await run_one(
        runtime(smollm2, says(smollm2), [toy], prompt_length=len(record.prompt_ids) - 1),
        task(**kwargs),
    )
    assert (long.stop_reason, long.reward) == ("prompt_too_long", None)
    assert toy.count("release") == 1


async def test_responses_that_do_not_fit_are_not_appended(smollm2: ChatTemplate) -> None:
    whole = await run_one(
        runtime(smollm2, says(smollm2, call("toy", do="say", text="word " * 30), "42"), [Toy()])
    )
    before, after = (
        whole.turns[0].end - len(whole.prompt_ids),
        whole.turns[1].start - len(whole.prompt_ids),
    )
    for limits in (
        {"response_length": after - 1},
        {"max_model_len": len(whole.prompt_ids) + after - 1},
    ):
        record = await run_one(
            runtime(
                smollm2, says(smollm2, call("toy", do="say", text="word " * 30)), [Toy()], **limits
            )
        )
        assert (record.stop_reason, len(record.response_ids)) == ("length", before)
        assert record.tool_calls[0].response == "word " * 30
        assert record.messages[-1]["role"] == "assistant"


async def test_responses_that_fit_exactly_leave_no_room_for_a_turn(smollm2: ChatTemplate) -> None:
    whole = await run_one(runtime(smollm2, says(smollm2, call("toy", do="say"), "42"), [Toy()]))
    after = whole.turns[1].start - len(whole.prompt_ids)
    record = await run_one(
        runtime(smollm2, says(smollm2, call("toy", do="say")), [Toy()], response_length=after)
    )
    assert (record.stop_reason, len(record.response_ids), record.num_turns) == ("length", after, 1)


@pytest.mark.parametrize("where", ["create", "engine", "tool"])
async def test_a_deadline_ends_what_hangs(smollm2: ChatTemplate, where: str) -> None:
    toy = Toy(calc_reward="reward", **({"create": "hang"} if where == "create" else {}))
    engine = says(
        smollm2,
        call("toy", do="say") + call("toy", do="hang") + "<tool_call>{",
        delay_s=60 if where == "engine" else 0,
    )
    record = await run_one(runtime(smollm2, engine, [toy], deadline_s=0.2))
    assert (record.stop_reason, record.infra_error) == ("deadline", False)
    if where == "tool":
        assert [line.status for line in record.tool_calls] == ["ok", "cancelled", "malformed"]
        assert (record.num_turns, record.reward, record.messages[-1]["role"]) == (
            1,
            1.0,
            "assistant",
        )
    else:
        assert (record.num_turns, record.response_ids, record.reward) == (0, [], None)
    assert toy.count("release") == toy.count("create") == (where != "create")


async def test_cancellation_is_passed_on_and_recorded(smollm2: ChatTemplate) -> None:
    toy = Toy()
    shared = runtime(smollm2, says(smollm2, call("toy", do="say"), call("toy", do="hang")), [toy])
    conversation = Conversation(task(), 0, shared)
    running = asyncio.create_task(converse(conversation))
    await toy.hanging.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    record = Trajectory.from_line(trajectory_of(conversation).to_line())
    assert (record.stop_reason, record.num_turns, record.reward, record.infra_error) == (
        "cancelled",
        2,
        None,
        False,
    )
    assert [line.status for line in record.tool_calls] == ["ok", "cancelled"]
    assert toy.count("release") == 1


class Slow(ScriptedEngine):
    """Hangs in the last of its turns; cancelled, it tells the first tokens of it."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        generation = await super().generate(prompt_ids, sampling, request_id=request_id)
        if generation.finish_reason != "abort":
            return generation
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Interrupted(generation) from None
        raise AssertionError


def cut_off(template: ChatTemplate, text: str) -> Generation:
    ids = template.encode(text)
    return Generation(ids, logprobs(ids), "abort")


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
async def test_the_tokens_of_a_turn_that_is_cut_off_are_kept(
    smollm2: ChatTemplate, reason: str
) -> None:
    """Its calls are not run, whole ones neither."""
    toy = Toy()
    begun = cut_off(smollm2, call("toy", do="say") + "\n<tool_call>{")
    script = says(smollm2, call("toy", do="say"), begun)
    engine = Slow(script._respond)
    limits = {"deadline_s": 0.2} if reason == "deadline" else {}
    conversation = Conversation(task(), 0, runtime(smollm2, engine, [toy], **limits))
    running = asyncio.create_task(converse(conversation))
    if reason == "cancelled":
        while len(conversation.ledger) < 1 or conversation.ledger[0].status != "ok":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        await running
    record = Trajectory.from_line(trajectory_of(conversation).to_line())
    assert (record.stop_reason, record.num_turns, record.turns[-1].finish_reason) == (
        reason,
        2,
        "abort",
    )
    assert record.response_ids[-len(begun.token_ids) :] == begun.token_ids
    assert record.response_logprobs[-len(begun.token_ids) :] == begun.logprobs
    assert [line.status for line in record.tool_calls][:2] == ["ok", "cancelled"]
    assert record.messages[-1]["raw"].endswith("<tool_call>{")
    assert toy.count("execute") == 1


def test_the_first_stop_reason_stays(smollm2: ChatTemplate) -> None:
    conversation = Conversation(task(), 0, runtime(smollm2, says(smollm2)))
    conversation.ending.stop("max_turns")
    conversation.ending.stop("cancelled")
    assert trajectory_of(conversation).stop_reason == "max_turns"


# ---------------------------------------------------------------------- infrastructure


@pytest.mark.parametrize(
    "answer",
    [
        EngineError("out of memory"),
        ValueError("a bug"),
        Generation([5], [-0.5], "abort"),
        Generation([], [], "stop"),
        Generation([5] * 11, [-0.5] * 11, "length"),
        Generation([5, 6], [-0.5], "stop"),
        Generation([5], [math.nan], "stop"),
        Generation([5], [-math.inf], "stop"),
        Generation([-1], [-0.5], "stop"),
        Generation([2**40], [-0.5], "stop"),
        Generation([5.0], [-0.5], "stop"),  # type: ignore[list-item]
        Generation([None], [-0.5], "stop"),  # type: ignore[list-item]
        Generation([5], [None], "stop"),  # type: ignore[list-item]
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
async def test_what_the_engine_cannot_do_is_never_a_reward(
    smollm2: ChatTemplate, answer: Any, turn: int
) -> None:
    toy = Toy(calc_reward="reward")
    first = [call("toy", do="say")] * turn

    class Raw(ScriptedEngine):
        """Answers as it is told to, however long."""

        async def generate(self, prompt_ids: Any, sampling: Any, *, request_id: str) -> Generation:
            return self._respond(prompt_ids, sampling)

    engine = Raw(says(smollm2, *first, answer)._respond)
    record = await run_one(
        runtime(
            smollm2,
            engine,
            [toy],
            max_tokens=10 if not turn else None,
            response_length=500 if not turn else 4096,
        )
    )
    if turn and isinstance(answer, Generation) and len(answer.token_ids) == 11:
        return  # there is room for it
    assert (record.stop_reason, record.infra_error, record.reward, record.reward_parts) == (
        "engine_error",
        True,
        None,
        {},
    )
    assert record.error
    assert "\n" not in record.error
    assert record.num_turns == turn
    assert len(record.response_ids) == (
        record.segments[-1][2] - len(record.prompt_ids) if turn else 0
    )
    assert record.segments[-1][0] == ("template" if turn else "prompt")
    assert toy.count("calc_reward") == 0
    assert toy.count("release") == 1


async def test_an_id_beyond_the_tokenizer_is_data(smollm2: ChatTemplate) -> None:
    """Models pad their vocabulary: such an id can be sampled; it decodes to nothing and stays."""
    record = await run_one(runtime(smollm2, says(smollm2, generation([60_000, smollm2.end_id]))))
    assert (record.stop_reason, record.response_ids, record.messages[-1]["raw"]) == (
        "stop",
        [60_000, smollm2.end_id],
        "",
    )
    (warning,) = record.warnings
    assert warning.kind == "unknown_ids"


async def test_a_backend_that_fails_is_never_a_reward(smollm2: ChatTemplate) -> None:
    toy = Toy(calc_reward="reward")
    record = await run_one(runtime(smollm2, says(smollm2, call("toy", do="backend"), "42"), [toy]))
    assert (record.stop_reason, record.infra_error, record.reward, record.reward_parts) == (
        "stop",
        True,
        None,
        {},
    )


@pytest.mark.parametrize("step", ["create", "calc_reward"])
async def test_a_tool_that_fails_outside_its_calls_is_never_a_reward(
    smollm2: ChatTemplate, step: str
) -> None:
    toys = [Toy(**{step: "bug"}), Toy("other", calc_reward="reward")]
    record = await run_one(runtime(smollm2, says(smollm2, "42"), toys))
    assert (record.stop_reason, record.infra_error, record.reward) == ("stop", True, None)
    assert record.error is not None
    assert record.error.startswith(f"tool toy: {step} failed: ZeroDivisionError")


async def test_rewards_that_add_up_to_no_number_do_not_break_the_record(
    smollm2: ChatTemplate,
) -> None:
    class Rich(Toy):
        async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
            return 1.7e308

    record = await run_one(runtime(smollm2, says(smollm2, "42"), [Rich("a"), Rich("b")]))
    assert record.infra_error or (record.reward is not None and math.isfinite(record.reward))


async def test_messages_that_the_template_refuses(smollm2: ChatTemplate) -> None:
    template = family("gemma")
    record = await run_one(
        runtime(template, says(template, "42")),
        task(messages=[{"role": "system", "content": "x"}, *QUESTION]),
    )
    assert (record.stop_reason, record.infra_error, record.prompt_ids) == (
        "engine_error",
        False,
        [],
    )
    assert record.error is not None
    assert "System role" in record.error


async def test_a_template_that_refuses_a_response_is_no_infrastructure_either(
    smollm2: ChatTemplate,
) -> None:
    class Refusing(ChatTemplate):
        def delta(self, *args: Any, **kwargs: Any) -> Any:
            raise TemplateError("the chat template refuses these messages")

    template = Refusing(smollm2.tokenizer)
    toy = Toy(calc_reward="reward")
    record = await run_one(runtime(template, says(template, call("toy", do="say")), [toy]))
    assert (record.stop_reason, record.infra_error, record.reward) == ("engine_error", False, None)
    assert "refuses" in str(record.error)
    assert [line.status for line in record.tool_calls] == ["ok"]
    assert (toy.count("calc_reward"), toy.count("released")) == (0, 1)


@pytest.mark.parametrize(
    ("deadline_s", "ends_s"), [(None, 60.0 + 60.0), (10.0, 10.0 + END_S), (1.0, END_S + END_S)]
)
def test_rewards_and_releases_run_at_once_and_within_the_deadline(
    smollm2: ChatTemplate, deadline_s: float | None, ends_s: float
) -> None:
    hangs: dict[str, Any] = {"calc_reward": "hang", "release": "hang", "timeout_s": 60.0}
    toys = [Toy(f"toy{number}", **hangs) for number in range(4)]

    async def run() -> tuple[Trajectory, float]:
        record = await run_one(runtime(smollm2, says(smollm2, "42"), toys, deadline_s=deadline_s))
        return record, asyncio.get_running_loop().time()

    record, ended = virtual_time.run(run())
    assert ended == pytest.approx(ends_s)
    assert (record.stop_reason, record.infra_error, record.reward) == ("stop", True, None)
    assert "calc_reward" in str(record.error)
    assert [warning.kind for warning in record.warnings] == ["release_failed"] * 4


async def test_rewards_whose_sum_has_no_float32_are_a_failure(smollm2: ChatTemplate) -> None:
    class Rich(Toy):
        async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
            return 3e38

    one = await run_one(runtime(smollm2, says(smollm2, "42"), [Rich("a")]))
    assert (one.reward, one.infra_error) == (3e38, False)
    two = await run_one(runtime(smollm2, says(smollm2, "42"), [Rich("a"), Rich("b")]))
    assert (two.reward, two.infra_error, two.reward_parts) == (None, True, {})
    assert "sum" in str(two.error)


# ----------------------------------------------- samples share nothing, and recorded runs run again


async def test_two_samples_of_a_task_share_nothing(smollm2: ChatTemplate) -> None:
    toy = Toy()
    shared_task = task(tools_kwargs={"toy": {"create_kwargs": {"text": "hello"}}}, extra={"k": []})
    for _ in range(2):
        record = await run_one(
            runtime(smollm2, says(smollm2, call("toy", do="mutate"), "42"), [toy]), shared_task
        )
        assert record.tool_calls[0].arguments == {"do": "mutate"}
        assert record.extra == {"k": []}
    assert shared_task.messages == QUESTION
    assert len({instance for _, instance in toy.log}) == 2


async def test_a_recorded_conversation_runs_again_on_its_own_record(smollm2: ChatTemplate) -> None:
    turns = [call("toy", do="say", text="é🙂"), call("nobody"), "42"]
    first = await run_one(runtime(smollm2, says(smollm2, *turns), [Toy()]))
    again = await run_one(runtime(smollm2, recorded([first]), [Toy()]))
    assert (again.prompt_ids, again.response_ids, again.response_mask, again.segments) == (
        first.prompt_ids, first.response_ids, first.response_mask, first.segments,
    )  # fmt: skip
    assert again.response_logprobs == first.response_logprobs
    other = await run_one(runtime(smollm2, recorded([first]), [Toy("another")]))
    assert other.stop_reason == "engine_error"


def test_settings_have_no_limits_that_were_not_asked_for() -> None:
    assert (settings().max_tokens, settings().max_turns, settings().deadline_s) == (
        None,
        None,
        None,
    )


# ---------------------------------------------------------------------- ended by what it runs on


async def test_an_engine_or_a_tool_may_end_a_conversation_with_a_reason_of_its_own(
    smollm2: ChatTemplate,
) -> None:
    toy = Toy(calc_reward="reward")
    late = await run_one(
        runtime(
            smollm2, says(smollm2, call("toy", do="say"), EndConversation("deadline", None)), [toy]
        )
    )
    assert (late.stop_reason, late.error, late.infra_error, late.reward) == (
        "deadline",
        None,
        False,
        1.0,
    )
    cut = await run_one(
        runtime(
            smollm2,
            says(smollm2, call("toy", do="say"), EndConversation("cancelled", "no more")),
            [toy],
        )
    )
    assert (cut.stop_reason, cut.error, cut.infra_error, cut.num_turns) == (
        "cancelled",
        "no more",
        False,
        1,
    )
    assert (cut.reward, toy.count("released")) == (None, 2)  # what was cut off has no reward
