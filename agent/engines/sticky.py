"""Which of several places serves a conversation: always the same, where its prefix is cached."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

Conversations: TypeAlias = weakref.WeakSet[Any]
"""The conversations of one place; one that has ended leaves by itself."""

_NAMED: ContextVar[object | None] = ContextVar("conversation", default=None)


def asks_for(conversation: object) -> None:
    """The running task asks for a conversation that other tasks ask for too."""
    _NAMED.set(conversation)


def asking_conversation() -> object | None:
    """The conversation that the running task asks for: the task itself, unless it said another."""
    return _NAMED.get() or asyncio.current_task()


def place_of(conversation: object | None, places: Sequence[Conversations]) -> int:
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
