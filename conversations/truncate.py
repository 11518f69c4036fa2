"""Cuts a long text to a number of tokens, with a visible marker where it was cut.

Invariant: the work depends on the limit, not on the length of the text: a tool output of 10 MB
costs as much as one of 100 KB.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from conversations.template import ChatTemplate

SIDES = ("left", "middle", "right")
"""The side that is cut away, as in a tokenizer's `truncation_side`: "right" keeps the beginning."""

_MARKER = re.compile(r"\n\.\.\. \[(\d{1,18}) characters cut\] \.\.\.\n", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shortened:
    """A text that was cut. `tokens_cut` is the number of tokens left out.

    It is counted for up to some thousand characters and estimated beyond.
    """

    text: str
    tokens_cut: int


def cut_to_tokens(text: str, limit: int, side: str, template: ChatTemplate) -> Shortened | None:
    """`text` cut to at most `limit` tokens plus the marker, or None if it fits.

    Raises ValueError for an unknown side.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    if len(text) <= limit and len(text.encode(errors="replace")) <= limit:
        return None  # a token holds at least one byte
    if len(text) <= _window(limit) and len(template.encode(text)) <= limit:
        return None  # the common case: without offsets, which take longer
    head_limit = {"right": limit, "middle": limit - limit // 2, "left": 0}[side]
    if len(_head(text, limit, template)) == len(text):
        return None
    head, tail = _head(text, head_limit, template), _tail(text, limit - head_limit, template)
    end = len(text) - len(tail)
    marked = f"{head}\n... [{end - len(head)} characters cut] ...\n{tail}"
    return Shortened(marked, _tokens(text, len(head), end, limit, template))


def is_cut_of(shown: str, text: str) -> bool:
    """Whether `shown` is `text` cut on any side: its beginning, a true marker, its end."""
    for marker in _MARKER.finditer(shown):
        head, tail = shown[: marker.start()], shown[marker.end() :]
        cut = int(marker[1])
        if (
            text.startswith(head)
            and text.endswith(tail)
            and cut > 0
            and len(head) + cut + len(tail) == len(text)
        ):
            return True
    return False


def _tokens(text: str, start: int, end: int, limit: int, template: ChatTemplate) -> int:
    """The number of tokens in `text[start:end]`, estimated from its beginning if it is long."""
    sample = text[start : min(end, start + _window(limit))]
    return round(len(template.encoding(sample).ids) * (end - start) / len(sample))


def _window(count: int) -> int:
    """Characters that hold more than `count` tokens of most texts."""
    return max(256, 8 * count)


def _head(text: str, count: int, template: ChatTemplate) -> str:
    """The longest beginning of `text` with at most `count` tokens and only whole characters."""
    window = _window(count)
    while True:
        piece = text[:window]
        encoding = template.encoding(piece)
        if len(encoding.ids) > count or window >= len(text):
            break
        window *= 4
    if len(encoding.ids) <= count:
        return piece
    return piece[: encoding.offsets[count][0]] if count else ""


def _tail(text: str, count: int, template: ChatTemplate) -> str:
    window = _window(count)
    while count:
        piece = text[-window:]
        encoding = template.encoding(piece)
        if len(encoding.ids) > count:
            start = encoding.offsets[-count - 1][
                1
            ]  # where the last dropped token ends: no half character stays
            while start < len(piece) and unicodedata.combining(piece[start]):
                start += 1
            return piece[start:]
        if window >= len(text):
            return text
        window *= 4
    return ""
