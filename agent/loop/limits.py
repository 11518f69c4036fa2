"""The limits on a tool's calls over all conversations of a run: slots, a rate, a circuit breaker.

Invariant: every `Gate.enter` that returns is followed by one `Gate.leave`. One that raises, because
it was cancelled or refused, has taken nothing: no slot, no place in the rate, no probe.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from tools.base import BackendError
from tools.policy import BreakerPolicy, Policy

BACKEND_FAILURES = frozenset({"backend_error", "timeout"})
"""Statuses of an attempt that a breaker counts."""


class CircuitOpenError(BackendError):
    """The call was not sent, because the tool's backend keeps failing."""


class Gate:
    """What each attempt to call a tool with limits passes through."""

    def __init__(self, policy: Policy) -> None:
        self._slots = asyncio.Semaphore(policy.max_concurrency) if policy.max_concurrency else None
        self._rate = Rate(policy.rate_limit) if policy.rate_limit else None
        self._breaker = Breaker(policy.circuit_breaker)

    @classmethod
    def of(cls, policy: Policy) -> Gate | None:
        """The gate of a policy; None if nothing limits the calls, the common case."""
        return (
            cls(policy)
            if policy.max_concurrency or policy.rate_limit or policy.circuit_breaker
            else None
        )

    async def enter(self) -> bool:
        """Waits until an attempt may begin; returns whether it probes the backend, for `leave`.

        Raises CircuitOpenError if the breaker is open, at once or after a wait in which it opened.
        """
        self._breaker.check()
        if self._slots is None:
            return await self._begin()
        await self._slots.acquire()
        try:
            return await self._begin()
        except BaseException:
            self._slots.release()
            raise

    async def _begin(self) -> bool:
        if self._rate is None:
            return self._breaker.begin()
        async with self._rate.turn:
            await self._rate.ready()
            probe = self._breaker.begin()
            self._rate.count()
            return probe

    def leave(self, status: str, *, probe: bool) -> None:
        """Ends an attempt that entered; `status` says how it ended."""
        self._breaker.end(status, probe=probe)
        if self._slots is not None:
            self._slots.release()


class Rate:
    """At most `per_second` attempts (rounded up) begin in any one second, and on average no more.

    They begin in the order in which they came: the next one holds `turn`.
    """

    def __init__(self, per_second: float) -> None:
        calls = math.ceil(per_second)
        self.turn = asyncio.Lock()
        self._window_s = calls / per_second
        self._begun: deque[float] = deque(maxlen=calls)

    async def ready(self) -> None:
        """Waits until another attempt may begin."""
        if len(self._begun) == self._begun.maxlen:
            wait_s = self._begun[0] + self._window_s - asyncio.get_running_loop().time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)

    def count(self) -> None:
        """Notes that an attempt begins now."""
        self._begun.append(asyncio.get_running_loop().time())


class Breaker:
    """Closed, it counts backend failures in a row. Open, it refuses all attempts.

    After its cooldown it lets one attempt at a time probe the backend.
    """

    def __init__(self, policy: BreakerPolicy | None) -> None:
        self._limit: float = policy.failures if policy else math.inf
        self._cooldown_s = policy.cooldown_s if policy else 0.0
        self._failures = 0
        self._refuses_until = 0.0
        self._probing = False

    def check(self) -> None:
        """Raises CircuitOpenError if an attempt would be refused."""
        if self._failures >= self._limit and (
            self._probing or asyncio.get_running_loop().time() < self._refuses_until
        ):
            raise CircuitOpenError(f"not sent: the backend failed {self._failures} times in a row")

    def begin(self) -> bool:
        """Lets an attempt begin; returns whether it is a probe. Raises CircuitOpenError."""
        self.check()
        probe = self._failures >= self._limit
        self._probing = self._probing or probe
        return probe

    def end(self, status: str, *, probe: bool) -> None:
        """Notes how an attempt ended: any answer closes the breaker, a cancellation does not."""
        if probe:
            self._probing = False
        if status in BACKEND_FAILURES:
            self._failures += 1
            if (
                probe or self._failures == self._limit
            ):  # one that began before the breaker opened prolongs nothing
                self._refuses_until = asyncio.get_running_loop().time() + self._cooldown_s
        elif status != "cancelled":
            self._failures = 0
