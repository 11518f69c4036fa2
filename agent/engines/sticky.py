"""Which of several places serves a conversation: always the same, where its prefix is cached."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

Conversations: TypeAlias = weakref.WeakSet[asyncio.Task[Any]]
"""The tasks that run the conversations of one place; one that has ended leaves by itself."""


def place_of(conversation: asyncio.Task[Any] | None, places: Sequence[Conversations]) -> int:
    """The index of the place that has the conversation.

    A new one is added to the place that has the fewest.
    """
    for index, place in enumerate(places):
        if conversation in place:
            return index
    chosen = min(range(len(places)), key=lambda index: len(places[index]))
    if conversation is not None:
        places[chosen].add(conversation)
    return chosen
