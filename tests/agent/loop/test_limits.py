"""Slots, rate and breaker: exact on a virtual clock, in order, and cancelled ones take nothing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from agent.loop.limits import CircuitOpenError, Gate
from tests import virtual_time
from tools.policy import BreakerPolicy, Policy


def now() -> float:
    return round(asyncio.get_running_loop().time(), 6)


async def pass_through(gate: Gate, status: str = "ok", takes_s: float = 0.0) -> float:
    """One attempt; returns when it began."""
    probe = await gate.enter()
    began, ended = now(), "cancelled"
    try:
        await asyncio.sleep(takes_s)
        ended = status
    finally:
        gate.leave(ended, probe=probe)
    return began


def gate(**limits: Any) -> Gate:
    made = Gate.of(Policy(**limits))
    assert made is not None
    return made


def test_without_limits_there_is_no_gate() -> None:
    assert Gate.of(Policy(timeout_s=1.0, retries=3, max_response_tokens=4)) is None


# ---------------------------------------------------------------------- rate


@pytest.mark.parametrize(
    ("per_second", "begun"),
    [
        (3, [0, 0, 0, 1, 1, 1, 2, 2]),
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.5, [0, 2, 4, 6, 8, 10, 12, 14]),
        (2.5, [0, 0, 0, 1.2, 1.2, 1.2, 2.4, 2.4]),  # a second never sees a fourth
        (1e6, [0] * 8),
    ],
)
def test_so_many_begin_in_a_second(per_second: float, begun: list[float]) -> None:
    async def crowd() -> list[float]:
        one = gate(rate_limit=per_second)
        return await asyncio.gather(*(pass_through(one, takes_s=5.0) for _ in range(8)))

    assert virtual_time.run(crowd()) == pytest.approx(begun)


@pytest.mark.parametrize("seed", range(20))
def test_no_second_sees_more_and_nobody_waits_in_vain(seed: int) -> None:
    """Random arrivals: one that waits begins a second after the one `limit` places before it."""
    rng = random.Random(seed)
    limit = rng.randrange(1, 6)
    arrivals = sorted(rng.choice((0.0, rng.uniform(0, 8))) for _ in range(40))

    async def call(one: Gate, arrival: float) -> float:
        await asyncio.sleep(arrival)
        return await pass_through(one, takes_s=rng.uniform(0, 3))

    async def crowd() -> list[float]:
        one = gate(rate_limit=float(limit))
        return await asyncio.gather(*(call(one, arrival) for arrival in arrivals))

    begun = virtual_time.run(crowd())
    assert begun == sorted(begun)  # first come, first served
    for index, (arrival, began) in enumerate(zip(arrivals, begun, strict=True)):
        earliest = begun[index - limit] + 1 if index >= limit else 0.0
        assert began == pytest.approx(max(arrival, earliest), abs=1e-5)


def test_a_rate_and_slots_hold_together() -> None:
    async def crowd() -> list[float]:
        one = gate(rate_limit=4.0, max_concurrency=2)
        return await asyncio.gather(*(pass_through(one, takes_s=0.4) for _ in range(10)))

    assert virtual_time.run(crowd()) == pytest.approx(
        [0, 0, 0.4, 0.4, 1.0, 1.0, 1.4, 1.4, 2.0, 2.0]
    )


# ---------------------------------------------------------------------- cancellation


def test_who_is_cancelled_in_the_queue_takes_nothing() -> None:
    async def crowd(cancelled: bool) -> list[float]:
        one = gate(rate_limit=1.0, max_concurrency=2)
        first = [asyncio.create_task(pass_through(one)) for _ in range(2)]
        doomed = [asyncio.create_task(pass_through(one)) for _ in range(5)] if cancelled else []
        last = [asyncio.create_task(pass_through(one)) for _ in range(3)]
        await asyncio.sleep(0.5)
        for task in doomed:
            task.cancel()
        return [await task for task in first + last]

    assert (
        virtual_time.run(crowd(True))
        == virtual_time.run(crowd(False))
        == pytest.approx([0, 1, 2, 3, 4])
    )


@pytest.mark.parametrize("seed", range(30))
def test_no_slot_and_no_probe_is_lost_in_a_storm_of_cancellations(seed: int) -> None:
    rng = random.Random(seed)
    slots = rng.randrange(1, 4)
    limits: dict[str, Any] = {
        "max_concurrency": slots,
        "circuit_breaker": BreakerPolicy(failures=2, cooldown_s=1.0),
    }
    if rng.random() < 0.7:
        limits["rate_limit"] = rng.choice((2.0, 10.0, 100.0))

    async def storm() -> None:
        one = gate(**limits)
        statuses = ("ok", "backend_error", "timeout", "tool_error")
        calls = [
            asyncio.create_task(
                _later(one, rng.uniform(0, 10), rng.choice(statuses), rng.uniform(0, 1))
            )
            for _ in range(120)
        ]
        for call in calls:
            if rng.random() < 0.4:
                asyncio.get_running_loop().call_later(rng.uniform(0, 12), call.cancel)
        await asyncio.wait(calls)
        await asyncio.sleep(2.0)  # the cooldown, and the rate's second
        await pass_through(one)  # a probe, if need be
        await asyncio.sleep(1.0)
        meeting = asyncio.Barrier(slots)

        async def meet() -> None:
            probe = await one.enter()
            await meeting.wait()
            one.leave("ok", probe=probe)

        async with asyncio.timeout(10):
            await asyncio.gather(*(meet() for _ in range(slots)))

    virtual_time.run(storm())


async def _later(one: Gate, delay_s: float, status: str, takes_s: float) -> None:
    await asyncio.sleep(delay_s)
    try:
        await pass_through(one, status, takes_s)
    except CircuitOpenError:
        return


# ---------------------------------------------------------------------- breaker


async def tried(one: Gate, *statuses: str, takes_s: float = 0.0) -> list[str]:
    """What became of attempts one after the other: "sent" or "refused"."""
    seen = []
    for status in statuses:
        try:
            await pass_through(one, status, takes_s)
            seen.append("sent")
        except CircuitOpenError:
            seen.append("refused")
    return seen


def test_it_opens_after_so_many_failures_in_a_row_and_only_then() -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=3, cooldown_s=10.0))
        assert (
            await tried(one, "backend_error", "timeout", "ok", "backend_error", "timeout")
            == ["sent"] * 5
        )
        assert (
            await tried(one, "tool_error", "backend_error", "timeout") == ["sent"] * 3
        )  # a ToolError is an answer
        assert await tried(one, "cancelled", "cancelled") == ["sent"] * 2  # which says nothing
        assert await tried(one, "backend_error", "ok", "ok") == ["sent", "refused", "refused"]

    virtual_time.run(run())


@pytest.mark.parametrize("limits", [{}, {"max_concurrency": 1}, {"rate_limit": 100.0}])
def test_after_the_cooldown_one_at_a_time_probes(limits: dict[str, Any]) -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=1, cooldown_s=10.0), **limits)
        assert await tried(one, "timeout", "ok") == ["sent", "refused"]
        await asyncio.sleep(9.9)
        assert await tried(one, "ok") == ["refused"]
        await asyncio.sleep(0.1)
        probes = await asyncio.gather(*(tried(one, "backend_error", takes_s=1.0) for _ in range(5)))
        assert probes == [["sent"], *[["refused"]] * 4]
        await asyncio.sleep(9.9)
        assert await tried(one, "ok") == ["refused"]  # it failed: another cooldown, from its end
        await asyncio.sleep(0.1)
        assert await tried(one, *["ok"] * 3, "timeout", "ok") == ["sent"] * 4 + ["refused"]

    virtual_time.run(run())


def test_who_comes_while_a_probe_holds_the_only_slot_is_refused_at_once() -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=1, cooldown_s=1.0), max_concurrency=1)
        assert await tried(one, "timeout") == ["sent"]
        await asyncio.sleep(1.0)
        probe = asyncio.create_task(tried(one, "ok", takes_s=5.0))
        await asyncio.sleep(1.0)
        assert (await tried(one, "ok"), now()) == (["refused"], 2.0)
        assert await probe == ["sent"]

    virtual_time.run(run())


def test_a_probe_that_is_cancelled_leaves_the_next_one_free_to_probe() -> None:
    async def run() -> None:
        one = gate(
            circuit_breaker=BreakerPolicy(failures=1, cooldown_s=1.0),
            rate_limit=1.0,
            max_concurrency=1,
        )
        assert await tried(one, "timeout") == ["sent"]
        await asyncio.sleep(1.0)
        probe = asyncio.create_task(tried(one, "ok", takes_s=5.0))
        await asyncio.sleep(0.5)
        probe.cancel()
        await asyncio.wait([probe])
        assert await tried(one, "ok", "ok") == ["sent", "sent"]

    virtual_time.run(run())


def test_failures_that_began_before_it_opened_prolong_nothing_and_an_answer_closes_it() -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=1, cooldown_s=2.0))
        late = [
            asyncio.create_task(tried(one, status, takes_s=s))
            for status, s in (("timeout", 1.9), ("timeout", 2.5), ("ok", 3.0))
        ]
        await asyncio.sleep(0)
        assert await tried(one, "backend_error") == ["sent"]
        await late[0]
        await asyncio.sleep(0.1)
        assert await tried(one, "backend_error", "ok") == [
            "sent",
            "refused",
        ]  # a probe at 2.0 s; open until 4.0 s
        await late[2]
        assert now() == 3.0
        assert await tried(one, "ok") == ["sent"]

    virtual_time.run(run())


@pytest.mark.parametrize(
    "limits",
    [{"max_concurrency": 2}, {"rate_limit": 2.0}, {"max_concurrency": 2, "rate_limit": 2.0}],
)
def test_whoever_waits_when_it_opens_is_refused_with_no_more_wait(limits: dict[str, Any]) -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=2, cooldown_s=100.0), **limits)
        crowd = await asyncio.gather(*(tried(one, "timeout", takes_s=0.9) for _ in range(50)))
        assert crowd == [["sent"]] * 2 + [["refused"]] * 48
        assert now() <= 1.0  # one may be waiting for the rate: it has the turn
        assert await tried(one, "ok") == ["refused"]

    virtual_time.run(run())


def test_who_is_refused_takes_no_place_in_the_rate() -> None:
    async def run() -> None:
        one = gate(circuit_breaker=BreakerPolicy(failures=1, cooldown_s=7.0), rate_limit=0.1)
        first, second = (asyncio.create_task(tried(one, "timeout", takes_s=5.0)) for _ in range(2))
        assert (await first, await second, now()) == (["sent"], ["refused"], 10.0)
        await asyncio.sleep(2.5)
        assert (await tried(one, "ok"), now()) == (["sent"], 12.5)

    virtual_time.run(run())
