"""Calls without a token around them: what opens one is its place, the start of the turn.

The start is behind blanks and thoughts. What only looks like a call further behind, in prose or in
a code block, is text: a model that explains a call does not make one.
"""

from __future__ import annotations

from collections.abc import Callable

from conversations.formats.blocks import THINK, Call, skip_space
from conversations.messages import ParsedTurn


def start_of_answer(text: str, in_think: bool) -> int:
    """The position of the first character behind blanks and thoughts."""
    position = skip_space(text, THINK.after(text, 0) if in_think else 0)
    while text.startswith(THINK.open, position):
        position = skip_space(text, THINK.after(text, position))
    return position


def read_bare(text: str, start: int, read: Callable[[list[Call]], int]) -> ParsedTurn:
    """A turn whose calls stand at `start`. `read` appends them and returns where they end."""
    calls: list[Call] = []
    end = read(calls)
    return ParsedTurn(text[:start] + text[end:], tuple(calls))
