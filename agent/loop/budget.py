"""The tokens that a session or a conversation may sample and add, exact for turns at once.

Invariant: what turns used and what running ones reserved is never more than the limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

ONE_AFTER_ANOTHER = (
    "turns asked at once that name no max tokens are sampled one after the other: each may use all "
    "that is left of response_length; set turntrace.max_tokens so that several fit"
)
"""What the user should know where turns may be asked at once and the config has no such limit.

A share of what is left, instead of all, would cut turns that turn out to be alone.
"""


@dataclass(slots=True)
class TokenBudget:
    """`limit` tokens, of which `used` are gone and `reserved` are held by turns being sampled."""

    limit: int
    used: int = 0
    reserved: int = 0
    _freed: asyncio.Event = field(default_factory=asyncio.Event)

    def is_used_up(self, added: int) -> bool:
        """Whether nothing may be sampled behind `added` new tokens, whatever running turns use."""
        return self.limit - self.used - added <= 0

    @asynccontextmanager
    async def reserve(self, added: int, most: int) -> AsyncIterator[int]:
        """How many tokens a turn may sample behind `added` new ones, held until the block ends.

        They are `most`, or all that is left, as for a turn alone: where running turns hold too
        much, it waits until they gave back what they did not use. 0 if the budget is used up.
        """
        while not self.is_used_up(added):
            left = self.limit - self.used - added
            room = min(most, left)
            if room <= left - self.reserved:
                break
            self._freed.clear()
            await self._freed.wait()
        else:
            yield 0
            return
        self.reserved += added + room
        try:
            yield room
        finally:
            self.reserved -= added + room
            self._freed.set()
