"""The boundary around foreign coroutines: it returns in time and raises only Exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent.loop.boundary import (
    END_S,
    FLOAT32_MAX,
    GRACE_S,
    CallTimeoutError,
    bounded,
    finite,
    time_left,
)
from tests import virtual_time
from tests.helpers import NotAnException


async def _never() -> None:
    await asyncio.Event().wait()


async def _deaf() -> None:
    """Swallows every cancellation for 100 seconds."""
    while asyncio.get_running_loop().time() < 100:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)


def raises(error: BaseException) -> Callable[[], Awaitable[Any]]:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise error

    return coroutine


def at_once(error: BaseException) -> Callable[[], Awaitable[Any]]:
    def begin() -> Awaitable[Any]:
        raise error

    return begin


ENDS = (SystemExit(3), NotAnException("a panic"), GeneratorExit(), asyncio.CancelledError())


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("begins", [raises, at_once])
async def test_what_is_no_exception_becomes_one(begins: Any, error: BaseException) -> None:
    with pytest.raises(RuntimeError, match=r"the coroutine (raised|cancelled)"):
        await bounded(begins(error), 5.0)


def test_a_keyboard_interrupt_of_another_thread_is_not_the_users() -> None:
    """A session's loop runs on a thread of its own: an interrupt raised there would end it."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(bounded(raises(KeyboardInterrupt()), 5.0))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert [type(error) for error in caught] == [RuntimeError]


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("no"), StopAsyncIteration()])
async def test_exceptions_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        await bounded(raises(error), 5.0)
    assert raised.value is error


@pytest.mark.parametrize(("hangs", "after_s"), [(_never, 2.0), (_deaf, 2.0 + GRACE_S)])
def test_the_time_limit_holds_whatever_the_coroutine_does(hangs: Any, after_s: float) -> None:
    async def run() -> float:
        with pytest.raises(CallTimeoutError):
            await bounded(hangs, 2.0)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(run()) == pytest.approx(after_s)


def test_our_own_cancellation_passes_within_the_grace_period() -> None:
    async def run() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.0):
                await bounded(_deaf, 60.0)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(run()) == pytest.approx(3.0 + GRACE_S)


async def test_what_cannot_be_awaited_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="async def"):
        await bounded(lambda: 42, 5.0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400, float("nan"), float("inf"), "1", None])
def test_a_reward_fits_a_float32(value: Any) -> None:
    with pytest.raises(TypeError, match="finite"):
        finite(value)


def test_the_largest_rewards_are_kept() -> None:
    assert finite(FLOAT32_MAX) == FLOAT32_MAX
    assert (finite(True), finite(-7)) == (1.0, -7.0)


def test_time_left_has_a_least_value() -> None:
    async def run() -> list[float]:
        async with asyncio.timeout(30) as deadline:
            early = time_left(deadline)
            await asyncio.sleep(29)
            return [early, time_left(deadline), time_left(asyncio.timeout(None))]

    assert virtual_time.run(run()) == [30, END_S, float("inf")]
