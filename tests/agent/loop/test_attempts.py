"""Attempts of a call: what is retried and when, what the ledger says of each, and how all end."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from agent.loop.attempts import pause_s
from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from conversations.formats.hermes import parse
from conversations.template import ChatTemplate
from conversations.trajectory import ToolCallRecord, Trajectory
from conversations.truncate import Shortened
from tests import virtual_time
from tests.helpers import Toy, call, run_one, runtime, says, until
from tools.base import BackendError, BaseTool, ToolError, ToolResponse
from tools.toolset import ToolSet

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "flaky", "parameters": {"type": "object"}},
}


class LostError(BackendError):
    """A backend failure of the tool's own making."""


class Flaky(BaseTool):
    """The k-th attempt does the k-th of `script`, later ones the last; `begun` has their times."""

    def __init__(self, *script: str, **config: Any) -> None:
        super().__init__(config, SCHEMA)
        self.script = script
        self.begun: list[float] = []

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        self.begun.append(asyncio.get_running_loop().time())
        do = self.script[min(len(self.begun), len(self.script)) - 1]
        if do == "lost":
            raise LostError("connection reset")
        if do == "hang":
            await asyncio.Event().wait()
        if do == "refuse":
            raise ToolError("not like this", {"code": 4})
        if do == "bug":
            raise ZeroDivisionError("secret")
        return ToolResponse(do), 0.5, {"n": len(self.begun)}


def cut(text: str, /, *, limit: int = 100, side: str = "right") -> Shortened | None:
    """By characters, which are tokens enough here."""
    return (
        None
        if len(text) <= limit
        else Shortened(text[:limit] if side == "right" else text[-limit:], len(text) - limit)
    )


async def turn(
    tools: ConversationTools, lines: list[ToolCallRecord], calls: int = 1
) -> list[ToolCallRecord]:
    pending = PendingTurn(0, parse(call("flaky") * calls).calls)
    await tools.create()
    try:
        await tools.run(pending)
    finally:
        lines += pending.lines()
        await tools.release()
    return lines


def tools_of(*tools: BaseTool) -> ConversationTools:
    return ConversationTools(
        Dispatcher(ToolSet.from_tools(tools), max_parallel_calls=64, shorten=cut), {}, None
    )


def served(tool: BaseTool) -> ToolCallRecord:
    """The ledger's line of one call, by the virtual clock."""
    (line,) = virtual_time.run(turn(tools_of(tool), []))
    return line


def attempts(line: ToolCallRecord) -> list[tuple[str, str | None, int | None, int]]:
    return [
        (attempt.status, attempt.error_class, attempt.bytes, attempt.tokens_cut)
        for attempt in line.attempts
    ]


# ---------------------------------------------------------------------- retries

RETRYING: dict[str, Any] = {"idempotent": True, "retries": 3, "timeout_s": 5.0}


def test_backend_failures_and_timeouts_are_tried_again_until_one_is_answered() -> None:
    tool = Flaky("lost", "hang", "fine", **RETRYING)
    line = served(tool)
    assert (line.status, line.response, line.reward, line.metrics, line.error) == (
        "ok",
        "fine",
        0.5,
        {"n": 3},
        None,
    )
    assert attempts(line) == [
        ("backend_error", "LostError", None, 0),
        ("timeout", "CallTimeoutError", None, 0),
        ("ok", None, 4, 0),
    ]
    assert "LostError: connection reset" in str(line.attempts[0].error)
    first, second, third = tool.begun
    assert 0.25 <= second - first <= 0.5
    assert 0.5 <= third - second - 5.0 <= 1.0  # the time-out, then twice the first pause


@pytest.mark.parametrize(("do", "status"), [("lost", "backend_error"), ("hang", "timeout")])
def test_the_last_failure_is_the_calls(do: str, status: str) -> None:
    tool = Flaky(do, **RETRYING)
    line = served(tool)
    assert [line.status, *(attempt.status for attempt in line.attempts)] == [status] * 5
    assert len(tool.begun) == 4
    assert (line.reward, line.metrics) == (None, {})


@pytest.mark.parametrize("do", ["refuse", "bug", "fine"])
def test_what_the_tool_itself_says_is_final(do: str) -> None:
    tool = Flaky(do, **RETRYING)
    assert len(served(tool).attempts) == len(tool.begun) == 1


@pytest.mark.parametrize("config", [{}, {"idempotent": True}, {"retries": 0}])
def test_nothing_is_tried_again_that_does_not_say_so(config: dict[str, Any]) -> None:
    line = served(Flaky("lost", "fine", **config))
    assert (line.status, len(line.attempts)) == ("backend_error", 1)


def test_a_call_takes_no_longer_than_its_attempts_and_pauses() -> None:
    tool = Flaky("hang", timeout_s=5.0, idempotent=True, retries=10)
    assert len(served(tool).attempts) == 11
    pauses = [later - earlier - 5.0 for earlier, later in pairwise(tool.begun)]
    longest = [0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8]
    assert all(
        most / 2 <= pause <= most + 1e-6 for pause, most in zip(pauses, longest, strict=True)
    )


def test_pauses_differ() -> None:
    assert len({pause_s(0) for _ in range(20)}) > 1


def test_a_pause_holds_no_slot() -> None:
    """One slot; the other call is served while the first one waits to be tried again."""
    tool = Flaky("lost", "fine", max_concurrency=1, **RETRYING)
    first, second = virtual_time.run(turn(tools_of(tool), [], calls=2))
    assert [len(line.attempts) for line in (first, second)] == [2, 1]
    assert first.status == second.status == "ok"
    assert tool.begun[:2] == [0.0, 0.0]


# -------------------------------------------------------------------- the breaker, seen from a call


def test_a_refused_call_says_so_to_the_model_and_to_the_record() -> None:
    tool = Flaky("lost", circuit_breaker={"failures": 2}, max_concurrency=1)
    lines = virtual_time.run(turn(tools_of(tool), [], calls=4))
    assert len(tool.begun) == 2
    assert [line.status for line in lines] == ["backend_error"] * 4
    assert [line.response for line in lines[1:3]] == [
        "Error: flaky is not available",
        "Error: flaky is not available: its backend keeps failing, so the call was not sent",
    ]
    assert attempts(lines[2]) == [("backend_error", "CircuitOpenError", None, 0)]
    assert lines[2].attempts[0].run_s == lines[2].run_s == 0.0
    assert "CircuitOpenError: " in str(lines[2].error)


def test_a_refused_call_is_not_tried_again() -> None:
    tool = Flaky("lost", circuit_breaker={"failures": 2}, **RETRYING)
    line = served(tool)
    assert [attempt.error_class for attempt in line.attempts] == [
        "LostError",
        "LostError",
        "CircuitOpenError",
    ]
    assert len(tool.begun) == 2


def test_the_breaker_is_the_runs_and_a_probe_brings_the_backend_back() -> None:
    tool = Flaky("lost", "lost", "fine", circuit_breaker={"failures": 2, "cooldown_s": 30})
    dispatcher = Dispatcher(ToolSet.from_tools([tool]), max_parallel_calls=64, shorten=cut)

    async def conversations() -> list[str]:
        seen = []
        for wait_s in (0, 0, 0, 29, 1, 0):
            await asyncio.sleep(wait_s)
            (line,) = await turn(ConversationTools(dispatcher, {}, None), [])
            seen.append(line.response or "")
        return seen

    seen = virtual_time.run(conversations())
    assert [text.startswith("Error: ") for text in seen] == [True] * 4 + [False] * 2
    assert seen[4:] == ["fine", "fine"]
    assert len(tool.begun) == 4


# ---------------------------------------------------------------------- what the ledger says


def test_the_size_of_an_answer_is_its_bytes_and_what_was_cut_its_tokens() -> None:
    text = "é🙂" * 60
    line = served(Flaky(text))
    assert (line.response, line.full_response) == (text[:100], text)
    assert attempts(line) == [("ok", None, 6 * 60, 20)]


LONG = "0123456789" * 11


@pytest.mark.parametrize(
    ("config", "shown", "tokens_cut"),
    [
        ({}, LONG[:100], 10),
        ({"response_side": "left"}, LONG[10:], 10),
        ({"max_response_tokens": 4}, "0123", 106),
        ({"max_response_tokens": 4, "response_side": "left"}, "6789", 106),
        ({"max_response_tokens": 1000}, LONG, 0),
    ],
)
def test_a_tools_own_limit_comes_before_the_runs(
    config: dict[str, Any], shown: str, tokens_cut: int
) -> None:
    line = served(Flaky(LONG, **config))
    assert (line.response, line.full_response) == (shown, LONG if tokens_cut else None)
    assert (line.attempts[0].bytes, line.attempts[0].tokens_cut) == (110, tokens_cut)


def test_a_refusal_is_an_answer_with_a_size_and_a_class() -> None:
    line = served(Flaky("refuse"))
    assert (line.status, line.response, line.metrics) == (
        "tool_error",
        "not like this",
        {"code": 4},
    )
    assert attempts(line) == [("tool_error", "ToolError", 13, 0)]


async def test_every_way_to_end_has_its_class() -> None:
    toy = Toy(timeout_s=0.05)
    does = {
        "say": None,
        "bug": "ZeroDivisionError",
        "tool_error": "ToolError",
        "backend": "BackendError",
        "hang": "CallTimeoutError",
        "wrong_type": "TypeError",
        "exit": "RuntimeError",
        "timeout_error": "TimeoutError",
    }
    tools = ConversationTools(
        Dispatcher(ToolSet.from_tools([toy]), max_parallel_calls=64, shorten=cut), {}, None
    )
    turn = PendingTurn(0, parse("".join(call("toy", do=do) for do in does)).calls)
    await tools.create()
    await tools.run(turn)
    await tools.release()
    lines = turn.lines()
    assert [line.attempts[0].error_class for line in lines] == list(does.values())
    assert [line.attempts[0].bytes for line in lines] == [
        0,
        None,
        len("no: "),
        None,
        None,
        None,
        None,
        None,
    ]
    assert all(len(line.attempts) == 1 for line in lines)


async def test_a_calls_seconds_are_the_sums_of_its_attempts() -> None:
    tool = Flaky("lost", "fine", max_concurrency=1, **RETRYING)
    for line in await turn(tools_of(tool), [], calls=2):
        assert line.queue_s == sum(attempt.queue_s for attempt in line.attempts)
        assert line.run_s == sum(attempt.run_s for attempt in line.attempts)
        assert line.queue_s > 0
    assert line.run_s > 0


# ---------------------------------------------------------------------- the end comes at once


@pytest.mark.parametrize(
    ("tool", "statuses"),
    [
        (Flaky("lost", idempotent=True, retries=10), ["backend_error", "cancelled"]),
        (Flaky("fine", "hang", max_concurrency=1), None),
        (Flaky("fine", rate_limit=0.001), None),
        (Flaky("fine", rate_limit=0.001, max_concurrency=1), None),
        (Flaky("fine", rate_limit=0.001, max_concurrency=1, circuit_breaker={}), None),
    ],
    ids=["pause", "slot", "rate", "rate and slot", "all"],
)
def test_a_deadline_ends_every_kind_of_wait_at_once(
    tool: Flaky, statuses: list[str] | None
) -> None:
    lines: list[ToolCallRecord] = []

    async def conversation() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await turn(tools_of(tool), lines, calls=1 if statuses else 3)
        return asyncio.get_running_loop().time()

    ended = virtual_time.run(conversation())
    assert ended == pytest.approx(0.2)
    if statuses:
        assert (lines[0].status, [attempt.status for attempt in lines[0].attempts]) == (
            "cancelled",
            statuses,
        )
    else:
        assert [line.status for line in lines] == ["ok", "cancelled", "cancelled"]
        assert [[attempt.status for attempt in line.attempts] for line in lines] == [
            ["ok"],
            ["cancelled"],
            ["cancelled"],
        ]
        assert lines[2].run_s == 0.0
        assert lines[2].response is None
    assert len(tool.begun) <= 2  # queued calls never begin


@pytest.mark.parametrize(
    ("script", "config", "infra"),
    [
        (("lost",), {"idempotent": True, "retries": 10}, True),
        (("hang",), {"idempotent": True, "retries": 10, "timeout_s": 0.5}, False),
        (("fine",), {"rate_limit": 0.001}, False),
        (("fine", "hang"), {"max_concurrency": 1}, False),
    ],
    ids=["pause", "pause after a time-out", "rate", "slot"],
)
def test_a_conversations_deadline_ends_it_at_once_and_a_backend_that_failed_meanwhile_is_no_reward(
    smollm2: ChatTemplate, script: tuple[str, ...], config: dict[str, Any], infra: bool
) -> None:
    class Paying(Flaky):
        released = 0

        async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
            return 0.0

        async def release(self, instance_id: str, **kwargs: Any) -> None:
            self.released += 1

    tool = Paying(*script, **config)

    async def conversation() -> tuple[Trajectory, float]:
        record = await run_one(
            runtime(smollm2, says(smollm2, call("flaky") * 3), [tool], deadline_s=7.0)
        )
        return record, asyncio.get_running_loop().time()

    record, ended = virtual_time.run(conversation())
    assert ended == pytest.approx(7.0)
    assert (record.stop_reason, record.num_turns, tool.released) == ("deadline", 1, 1)
    assert record.tool_calls[-1].status == record.tool_calls[-1].attempts[-1].status == "cancelled"
    assert (record.infra_error, record.reward) == ((True, None) if infra else (False, 0.0))
    assert ("call_0_0 was cut off" in str(record.error)) == infra


async def test_cancelling_reaches_the_tool_and_frees_its_slot() -> None:
    class Noticing(Toy):
        cancelled = 0

        async def execute(
            self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
        ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
            try:
                return await super().execute(instance_id, parameters, **kwargs)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    toy = Noticing(max_concurrency=1)
    dispatcher = Dispatcher(ToolSet.from_tools([toy]), max_parallel_calls=64, shorten=cut)
    first, second = ConversationTools(dispatcher, {}, None), ConversationTools(dispatcher, {}, None)
    await first.create()
    await second.create()
    hangs = PendingTurn(0, parse(call("toy", do="hang")).calls)
    says = PendingTurn(0, parse(call("toy", do="say", text="fine")).calls)
    hanging = asyncio.create_task(first.run(hangs))
    await until(toy.hanging.is_set)
    waiting = asyncio.create_task(second.run(says))
    await until(lambda: True)
    assert (toy.count("execute"), says.lines()[0].attempts) == (1, [])
    hanging.cancel()
    await asyncio.wait_for(waiting, 60)
    (line,) = says.lines()
    assert (line.status, line.response) == ("ok", "fine")
    assert (hanging.cancelled(), toy.cancelled) == (True, 1)
    await first.release()
    await second.release()
    assert asyncio.all_tasks() == {asyncio.current_task()}
