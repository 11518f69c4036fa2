"""What all call formats share: the walk over a turn's text, and thoughts.

A turn is content, thoughts and call blocks. `read_turn` walks over it once: a thought stays in the
content and is skipped, a block is handed to the format, which appends its calls and returns where
the block ends. So content pieces and the `raw` of the calls, in order, always cover the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from conversations.messages import MalformedToolCall, ParsedTurn, ToolCall

Call = ToolCall | MalformedToolCall

SPACE = " \t\r\n"
"""What may stand between tags without a meaning."""


@dataclass(frozen=True, slots=True)
class Thought:
    """The tags around a thought. A thought that is not closed covers the rest of the turn."""

    open: str = "<think>"
    close: str = "</think>"

    def is_open(self, text: str) -> bool:
        """Whether a text, such as a generation prompt, leaves a thought open at its end."""
        return text.rfind(self.open) > text.rfind(self.close)

    def after(self, text: str, position: int) -> int:
        """Where the thought ends that is open at `position`."""
        close = text.find(self.close, position)
        return len(text) if close < 0 else close + len(self.close)


THINK = Thought()

ReadBlock = Callable[[int, list[Call]], int]
"""Reads the block that opens at a position, appends its calls, returns where the text goes on
(further right)."""


def opening(thought: Thought, *tags: str) -> re.Pattern[str]:
    """Finds what opens a thought or a block. `tags` are regular expressions."""
    return re.compile(one_of(re.escape(thought.open), *tags))


def one_of(*patterns: str, **named: str) -> str:
    """A regular expression for any of these; `named` ones become groups.

    If all begin with `<`, so does the result: a search then skips plain text ten times as fast.
    """
    every = [("", pattern) for pattern in patterns] + [(f"?P<{key}>", named[key]) for key in named]
    if all(pattern.startswith("<") for _, pattern in every):
        return "<(?:" + "|".join(f"({key or '?:'}{pattern[1:]})" for key, pattern in every) + ")"
    return "|".join(f"({key or '?:'}{pattern})" for key, pattern in every)


def read_turn(
    text: str, opens: re.Pattern[str], thought: Thought, in_think: bool, block: ReadBlock
) -> ParsedTurn:
    """The content and the calls of a turn. `opens` comes from `opening`."""
    content: list[str] = []
    calls: list[Call] = []
    copied = 0
    position = thought.after(text, 0) if in_think else 0
    while (found := opens.search(text, position)) is not None:
        if found.group() == thought.open:
            position = thought.after(text, found.end())
            continue
        content.append(text[copied : found.start()])
        copied = position = block(found.start(), calls)
    content.append(text[copied:])
    return ParsedTurn("".join(content), tuple(calls))


def skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in SPACE:
        position += 1
    return position


def excerpt(text: str, position: int, length: int = 40) -> str:
    """What stands at a position, for a message: quoted and short, or "the end of the turn"."""
    piece = text[position : position + length]
    return repr(piece) if piece else "the end of the turn"
