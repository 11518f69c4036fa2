"""One turn's calls: each gets one line with the right status, and its siblings never notice."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from agent.loop.boundary import GRACE_S, describe
from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from conversations.formats.hermes import parse
from conversations.trajectory import ToolCallRecord, canonical_json
from conversations.truncate import Shortened
from tests.helpers import OK, TOOL_ERRORS, Toy, call, until
from tools.base import BaseTool, ToolError, ToolResponse
from tools.function import tool
from tools.toolset import ToolSet


def tools_of(
    *toys: Any,
    limit: int = 16,
    kwargs: dict[str, Any] | None = None,
    truth: Any = None,
    shorten: Any = lambda text: None,
) -> ConversationTools:
    return ConversationTools(
        Dispatcher(ToolSet.from_tools(toys), max_parallel_calls=limit, shorten=shorten),
        kwargs or {},
        truth,
    )


async def run(tools: ConversationTools, *calls: str, turn: int = 0) -> list[ToolCallRecord]:
    """Runs a turn's calls from creation to release."""
    pending = PendingTurn(turn, parse("".join(calls)).calls)
    await tools.create()
    try:
        await tools.run(pending)
    finally:
        await tools.release()
    return pending.lines()


# ---------------------------------------------------------------------- statuses


@pytest.mark.parametrize("do", sorted(OK))
async def test_answers_that_are_fine(do: str) -> None:
    (line,) = await run(tools_of(Toy()), call("toy", do=do, text="0.5"))
    assert (line.status, line.error) == ("ok", None)
    assert isinstance(line.response, str)
    assert line.response.encode() is not None  # no half surrogates
    assert canonical_json(line.metrics)


@pytest.mark.parametrize("do", sorted(TOOL_ERRORS))
async def test_a_tools_own_failures_are_tool_errors(do: str) -> None:
    (line,) = await run(tools_of(Toy()), call("toy", do=do, text="why"))
    assert line.status == "tool_error"
    assert line.reward is None
    assert line.metrics == {}
    assert line.response
    assert "\n" not in line.response
    assert "secret internals" not in line.response  # the model gets one line without internals
    assert [attempt.status for attempt in line.attempts] == ["tool_error"]


async def test_tool_error_is_text_for_the_model_and_a_bug_is_for_the_record() -> None:
    refused, bug = await run(
        tools_of(Toy()), call("toy", do="tool_error", text="é"), call("toy", do="bug")
    )
    assert (refused.response, refused.error) == ("no: é", None)
    assert bug.response == "Error: toy failed"
    assert bug.error is not None
    assert bug.error.startswith("ZeroDivisionError: secret internals (helpers.py:")


class NoCoroutine(BaseTool):
    """The two slips of whoever writes a first tool class."""

    def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        return ToolResponse("x"), None, {}


class NoTriple(BaseTool):
    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        return "only a text"


class NoCoroutineAtFirst(BaseTool):
    def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        return instance_id, ToolResponse()


async def test_what_create_does_wrong_is_named_too() -> None:
    made = NoCoroutineAtFirst(
        {}, {"type": "function", "function": {"name": "first", "parameters": {"type": "object"}}}
    )
    tools = tools_of(made)
    await tools.create()
    assert "async def" in str(tools.failure)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoCoroutine, "async def"),
        (NoTriple, "execute must return (ToolResponse, step reward or None, metrics), got str"),
    ],
)
async def test_what_a_class_does_wrong_is_named_in_the_ledger(
    kind: type[BaseTool], said: str
) -> None:
    made = kind(
        {}, {"type": "function", "function": {"name": "first", "parameters": {"type": "object"}}}
    )
    (line,) = await run(tools_of(made), call("first"))
    assert (line.status, line.response) == ("tool_error", "Error: first failed")
    assert said in str(line.error)


async def test_a_backend_that_cannot_be_reached() -> None:
    (line,) = await run(tools_of(Toy()), call("toy", do="backend"))
    assert (line.status, line.response) == ("backend_error", "Error: toy is not available")
    assert line.error is not None
    assert "BackendError: connection refused" in line.error


async def test_a_hanging_tool_times_out() -> None:
    toy = Toy(timeout_s=0.05)
    (line,) = await run(tools_of(toy), call("toy", do="hang"))
    assert (line.status, line.response) == ("timeout", "Error: toy did not answer within 0.05 s")
    assert toy.count("execute") == 1
    assert toy.count("executed") == 0


async def test_a_tools_own_timeout_error_is_its_bug() -> None:
    (line,) = await run(tools_of(Toy()), call("toy", do="timeout_error"))
    assert line.status == "tool_error"


async def test_wrong_calls_are_told_what_is_wrong() -> None:
    toy = Toy()
    unknown, invalid, missing, extra, malformed = await run(
        tools_of(toy, Toy("other")),
        call("typo"),
        call("toy", do=7),
        call("toy"),
        call("toy", do="say", more=1),
        "<tool_call>{oops</tool_call>",
    )
    assert (unknown.status, unknown.name) == ("unknown_tool", "typo")
    assert unknown.response == "Error: there is no tool named 'typo'; the tools are: toy, other"
    assert invalid.status == missing.status == extra.status == "invalid_arguments"
    assert invalid.response == 'Error: invalid arguments for toy: do: 7 is not of type "string"'
    assert missing.response is not None
    assert '"do" is a required property' in missing.response
    assert malformed.status == "malformed"
    assert malformed.response is not None
    assert malformed.response.startswith("Error: malformed tool call: not valid JSON")
    assert malformed.arguments == "<tool_call>{oops</tool_call>"
    assert toy.count("execute") == 0
    assert all(line.attempts == [] for line in (unknown, invalid, missing, extra, malformed))


async def test_calls_over_the_limit_are_rejected_and_not_run() -> None:
    toy = Toy()
    lines = await run(
        tools_of(toy, limit=2), *[call("toy", do="say", text=str(number)) for number in range(4)]
    )
    assert [line.status for line in lines] == ["ok", "ok", "rejected", "rejected"]
    assert lines[2].response == "Error: not run: at most 2 tool calls are allowed in one turn"
    assert toy.count("execute") == 2


async def test_lines_are_in_call_order_and_named_by_turn() -> None:
    lines = await run(
        tools_of(Toy()),
        call("toy", do="nap", text="0.05"),
        call("toy", do="say", text="b"),
        call("no"),
        turn=3,
    )
    assert [line.call_id for line in lines] == ["call_3_0", "call_3_1", "call_3_2"]
    assert [line.response for line in lines[:2]] == ["rested", "b"]
    assert {line.turn for line in lines} == {3}


async def test_a_call_that_never_ran_is_cancelled() -> None:
    (line,) = PendingTurn(0, parse(call("toy", do="say")).calls).lines()
    assert (line.status, line.response, line.attempts) == ("cancelled", None, [])


async def test_arguments_that_the_validator_chokes_on_are_the_calls_own_trouble() -> None:
    parameters = {
        "type": "object",
        "properties": {"x": {"type": "number", "multipleOf": 0.01}, "s": {"type": "string"}},
    }
    schema = {"type": "function", "function": {"name": "picky", "parameters": parameters}}
    huge, fine = await run(
        tools_of(Picky({}, schema)), call("picky", x=10**400), call("picky", s="x")
    )
    assert huge.status in ("ok", "invalid_arguments", "tool_error")
    assert huge.response is not None
    assert fine.status == "ok"


class Picky(BaseTool):
    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse("fine"), None, {}


# ---------------------------------------------------------------------- siblings


@pytest.mark.parametrize("do", sorted({*TOOL_ERRORS, "backend", "hang", "stubborn"}))
async def test_siblings_never_notice(do: str) -> None:
    toy, other = Toy(timeout_s=0.1), Toy("other")
    first, bad, last = await run(
        tools_of(toy, other),
        call("other", do="nap", text="0.15"),
        call("toy", do=do),
        call("other", do="reward", text="0.25"),
    )
    toy.stuck.set()
    assert (first.status, first.response) == ("ok", "rested")
    assert (last.status, last.reward, last.metrics) == ("ok", 0.25, {"n": 1})
    assert bad.status == (
        "timeout"
        if do in ("hang", "stubborn")
        else "backend_error"
        if do == "backend"
        else "tool_error"
    )


async def test_calls_of_a_turn_run_at_once() -> None:
    """Each call waits for the other: one after the other they would never end."""
    meeting = asyncio.Barrier(3)

    @tool
    async def meet() -> str:
        """Waits for the others."""
        await meeting.wait()
        return "met"

    lines = await run(tools_of(meet), *[call("meet")] * 3)
    assert [line.response for line in lines] == ["met"] * 3


async def test_a_stubborn_tool_holds_nobody_up() -> None:
    toy = Toy(timeout_s=0.05)
    lines = await asyncio.wait_for(run(tools_of(toy), call("toy", do="stubborn")), GRACE_S + 30)
    toy.stuck.set()
    assert [line.status for line in lines] == ["timeout"]


async def test_at_most_max_concurrency_calls_of_a_tool_over_all_conversations() -> None:
    running = peak = 0

    @tool(max_concurrency=2)
    async def narrow() -> str:
        """Counts who is inside."""
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01)
        running -= 1
        return "out"

    dispatcher = Dispatcher(
        ToolSet.from_tools([narrow]), max_parallel_calls=16, shorten=lambda text: None
    )
    conversations = [ConversationTools(dispatcher, {}, None) for _ in range(5)]
    turns = await asyncio.gather(
        *(run(tools, call("narrow"), call("narrow")) for tools in conversations)
    )
    assert peak == 2
    assert {line.status for lines in turns for line in lines} == {"ok"}
    assert max(line.queue_s for lines in turns for line in lines) > 0


# ------------------------------------------------------------------ what tools can and cannot touch


async def test_what_a_tool_does_to_its_arguments_stays_with_it() -> None:
    tools = tools_of(Toy())
    (line,) = await run(tools, call("toy", do="mutate", text="x"))
    assert line.arguments == {"do": "mutate", "text": "x"}


async def test_what_a_tool_does_to_its_rows_kwargs_stays_with_it() -> None:
    class Greedy(BaseTool):
        async def create(
            self, instance_id: str | None = None, **create_kwargs: Any
        ) -> tuple[str, ToolResponse]:
            create_kwargs["given"].append("mine")
            create_kwargs["ground_truth"].clear()
            return str(instance_id), ToolResponse()

        async def execute(
            self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
        ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
            kwargs["given"].append("mine")
            return ToolResponse(str(len(kwargs["given"]))), None, {}

    schema = {"type": "function", "function": {"name": "greedy"}}
    kwargs = {"greedy": {"create_kwargs": {"given": ["row"]}, "execute_kwargs": {"given": ["row"]}}}
    truth = ["42"]
    for _ in range(2):  # a second sample of the same task
        lines = await run(
            tools_of(Greedy({}, schema), kwargs=kwargs, truth=truth), call("greedy"), call("greedy")
        )
        assert [line.response for line in lines] == ["2", "2"]
    assert kwargs == {
        "greedy": {"create_kwargs": {"given": ["row"]}, "execute_kwargs": {"given": ["row"]}}
    }
    assert truth == ["42"]


async def test_metrics_without_a_json_form_become_text() -> None:
    nan, odd = await run(
        tools_of(Toy()), call("toy", do="nan_metrics"), call("toy", do="odd_metrics")
    )
    assert nan.metrics == {"nan": "inf", "n": 7}
    assert odd.metrics["nan"] == "nan"
    assert odd.metrics["3"] == "{1}"
    assert canonical_json(odd.metrics)


async def test_half_surrogates_are_shown_as_replacement_characters() -> None:
    (line,) = await run(tools_of(Toy()), call("toy", do="surrogate"))
    assert line.response == "half \ufffd of a pair \ufffd"


async def test_a_long_answer_is_cut_for_the_model_and_whole_in_the_ledger() -> None:
    tools = tools_of(
        Toy(), shorten=lambda text: Shortened(text[:3] + "...", 9) if len(text) > 10 else None
    )
    long, short, error = await run(
        tools, call("toy", do="long"), call("toy", do="say", text="ab"), call("nobody")
    )
    assert long.response == "man..."
    assert long.full_response is not None
    assert long.full_response.startswith("many words, many words, ")
    assert (short.response, short.full_response) == ("ab", None)
    assert error.response == "Err..."


# ---------------------------------------------------------------------- life of the instances


async def test_one_instance_a_conversation_created_once_and_released_once() -> None:
    toy, other = Toy(), Toy("other")
    tools = tools_of(toy, other)
    await run(tools, call("toy", do="say"), call("toy", do="say"), call("other", do="bug"))
    for one in (toy, other):
        assert one.count("create") == one.count("release") == one.count("released") == 1
        assert len({instance for _, instance in one.log}) == 1
    await tools.release()
    assert toy.count("release") == 1


async def test_verls_own_instance_id_is_used() -> None:
    class Own(Toy):
        async def create(
            self, instance_id: str | None = None, **create_kwargs: Any
        ) -> tuple[str, ToolResponse]:
            return "mine", ToolResponse()

    toy = Own()
    await run(tools_of(toy), call("toy", do="say"))
    assert {instance for _, instance in toy.log} == {"mine"}


@pytest.mark.parametrize(
    "do", ["bug", "exit", "panic", "unprintable", "hang", "wrong_type", "backend", "cancel_itself"]
)
async def test_a_tool_that_cannot_be_created_answers_none_of_its_calls(do: str) -> None:
    broken, other = Toy(create=do, timeout_s=0.05), Toy("other")
    tools = tools_of(broken, other)
    first, second = await run(tools, call("toy", do="say"), call("other", do="say", text="fine"))
    assert (first.status, first.response) == ("backend_error", "Error: toy is not available")
    assert (second.status, second.response) == ("ok", "fine")
    assert tools.failure is not None
    assert tools.failure.startswith("tool toy: create ")
    assert first.error == tools.failure
    assert broken.count("execute") == 0
    assert broken.count("release") == 0
    assert other.count("release") == 1


async def test_what_tools_say_when_created_is_theirs_by_name() -> None:
    tools = tools_of(
        Toy(),
        Toy("quiet"),
        Toy("third"),
        kwargs={
            "third": {"create_kwargs": {"text": "half \ud83d"}},
            "toy": {"create_kwargs": {"text": "hello"}},
        },
    )
    assert await tools.create() == [
        {"role": "tool", "content": "hello", "name": "toy"},
        {"role": "tool", "content": "half \ufffd", "name": "third"},
    ]
    await tools.release()


async def test_rewards_by_tool() -> None:
    tools = tools_of(Toy(calc_reward="reward"), Toy("none"), Toy("true", calc_reward="true_reward"))
    await tools.create()
    assert await tools.rewards() == {"toy": 1.0, "true": 1.0}
    assert tools.failure is None
    await tools.release()


@pytest.mark.parametrize(
    "do", ["bug", "exit", "unprintable", "nan_reward", "text_reward", "huge_reward", "hang"]
)
async def test_a_reward_that_cannot_be_had_is_a_failure_and_never_a_zero(do: str) -> None:
    tools = tools_of(Toy(calc_reward=do, timeout_s=0.05), Toy("other", calc_reward="reward"))
    await tools.create()
    assert await tools.rewards() == {"other": 1.0}
    assert tools.failure is not None
    assert tools.failure.startswith("tool toy: calc_reward ")
    await tools.release()


@pytest.mark.parametrize("do", ["bug", "exit", "unprintable", "hang", "stubborn", "cancel_itself"])
async def test_a_release_that_fails_stops_no_other(do: str) -> None:
    bad, other = Toy(release=do, timeout_s=0.05), Toy("other")
    tools = tools_of(other, bad)
    await run(tools)
    bad.stuck.set()
    assert bad.count("release") == other.count("released") == 1
    assert [warning.kind for warning in tools.warnings] == ["release_failed"]


async def test_the_row_chooses_the_tools() -> None:
    tools = tools_of(Toy(), Toy("other"), kwargs={"other": {}, "missing": {}})
    assert list(tools.offered) == ["other"]
    [warning] = tools.warnings
    assert (warning.kind, "'missing'" in warning.text) == ("unknown_tool_kwargs", True)
    (line,) = await run(tools, call("toy", do="say"))
    assert line.status == "unknown_tool"


# ---------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("step", ["create", "execute", "calc_reward", "release"])
@pytest.mark.parametrize("do", ["hang", "stubborn"])
async def test_cancellation_passes_through_and_every_tool_is_released(step: str, do: str) -> None:
    first, stuck, last = (
        Toy("first"),
        Toy("toy", timeout_s=0.5, **({step: do} if step != "execute" else {})),
        Toy("last"),
    )
    tools = tools_of(first, stuck, last)
    calls = (call("toy", do=do) if step == "execute" else "") + call("first", do="say")

    async def conversation() -> None:
        try:
            await tools.create()
            await tools.run(PendingTurn(0, parse(calls).calls))
            await tools.rewards()
        finally:
            await tools.release()

    running = asyncio.create_task(conversation())
    await until(stuck.hanging.is_set)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    stuck.stuck.set()
    assert first.count("create") == first.count("release") == 1
    assert last.count("create") == last.count("release") == 1
    if step != "create":
        assert stuck.count("release") == 1


async def test_cancelled_calls_say_so() -> None:
    toy = Toy()
    tools = tools_of(toy)
    calls = parse(call("toy", do="say", text="x") + call("toy", do="hang") + "<tool_call>{").calls
    turn = PendingTurn(0, calls)
    await tools.create()
    running = asyncio.create_task(tools.run(turn))
    await until(toy.hanging.is_set)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await tools.release()
    lines = turn.lines()
    assert [line.status for line in lines] == ["ok", "cancelled", "malformed"]
    assert [attempt.status for attempt in lines[1].attempts] == ["cancelled"]


async def test_a_tool_created_in_the_moment_of_cancellation_is_released() -> None:
    """The create that is cancelled has just succeeded: nobody else knows of the instance."""

    class Quick(Toy):
        async def create(
            self, instance_id: str | None = None, **create_kwargs: Any
        ) -> tuple[str, ToolResponse]:
            running.cancel()  # takes effect when this coroutine has already returned
            return await super().create(instance_id, **create_kwargs)

    toy = Quick()
    tools = tools_of(toy)
    running = asyncio.create_task(tools.create())
    with pytest.raises(asyncio.CancelledError):
        await running
    await tools.release()
    assert toy.count("create") == toy.count("release") == 1


async def test_a_tool_created_long_after_its_time_is_released_too() -> None:
    """It ignored its cancellation: the conversation has ended when there is an instance at last."""

    class Late(Toy):
        async def create(
            self, instance_id: str | None = None, **create_kwargs: Any
        ) -> tuple[str, ToolResponse]:
            while not self.stuck.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.stuck.wait()
            return await super().create(instance_id, **create_kwargs)

    toy = Late(timeout_s=0.05)
    tools = tools_of(toy)
    assert await tools.create() == []
    assert tools.failure is not None
    await tools.release()
    assert toy.count("release") == 0
    toy.stuck.set()
    await until(lambda: toy.count("create") == toy.count("release") == 1)


# ---------------------------------------------------------------------- exceptions as text


def test_describe_names_class_message_line_and_cause() -> None:
    try:
        try:
            raise ToolError("inner")
        except ToolError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        text = describe(error)
    assert text.startswith("ValueError: outer (test_calls.py:")
    assert text.endswith(") from ToolError: inner")
    assert describe(KeyError("x")) == "KeyError: 'x'"
