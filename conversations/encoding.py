"""Text to token ids, segment by segment: what stands between two added tokens is encoded once and
remembered.

A tokenizer cuts its added tokens (`<|im_start|>`, `<|im_end|>`, ...) out of a text before it
encodes the rest, so the ids of a text are the ids of its segments in order. Chats repeat their
segments: the tools in every prompt, the scaffold of every turn. Where a tokenizer's ids depend on
more than the segment, which a probe finds out, texts are encoded whole.

Whole texts may be encoded by `fastokens`; see fast_encoding.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from conversations.fast_encoding import Encode, proven_fast_encode

REMEMBERED_SEGMENTS = 256
"""The least recently used are forgotten first."""
REMEMBERED_CHARACTERS = 20_000
"""Longer segments are encoded each time: what is remembered stays below some 60 MB."""

_EDGES = (
    "x",
    " x",
    "x ",
    "",
    " ",
    "  ",
    "\n",
    "\n\nx",
    "x\n",
    "é\u2028",
    "42",
    "<|",
    "|>",
    "Ⅷ",
    "e\u0301",
    "\u0301",
)
"""What a tokenizer may treat differently at the edge of a segment."""


class SegmentEncoder:
    """Encodes as `tokenizer` (a Hugging Face fast tokenizer) does, added tokens recognised, none
    put in.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._fast: Encode | None = None
        self._remember = functools.lru_cache(REMEMBERED_SEGMENTS)(self.whole)
        added = list(tokenizer.added_tokens_decoder.values())
        names = sorted(
            (token.content for token in added), key=len, reverse=True
        )  # as there, the longest match wins
        self._cuts = (
            re.compile(f"({'|'.join(map(re.escape, names))})") if names else re.compile(r"(?!)")
        )
        takes_surroundings = any(
            token.normalized or token.lstrip or token.rstrip or token.single_word for token in added
        )
        self.by_segment = not takes_surroundings and self._proven(names)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which must not hold lone surrogates."""
        if not self.by_segment:
            return list(self.whole(text))
        return self._segments_of(text)

    def whole(self, text: str) -> Sequence[int]:
        """The same, in one go."""
        if self._fast is not None:
            return self._fast(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def use_fast(self, texts: Iterable[str]) -> bool:
        """Encodes with `fastokens` from now on, if it gives the same ids for `texts` and others.

        Returns whether it is used.
        """
        self._fast = proven_fast_encode(self._backend, texts)
        return self.is_fast

    @property
    def is_fast(self) -> bool:
        """Whether whole texts are encoded by `fastokens`."""
        return self._fast is not None

    @property
    def remembered(self) -> int:
        """How many segments are remembered now."""
        return self._remember.cache_info().currsize

    def _segments_of(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment in self._cuts.split(text):
            if segment:
                ids += (
                    self._remember(segment)
                    if len(segment) <= REMEMBERED_CHARACTERS
                    else self.whole(segment)
                )
        return ids

    def _proven(self, names: Sequence[str]) -> bool:
        texts = [
            f"{before}{name}{after}{name}{before}"
            for name in names[:4]
            for before in _EDGES
            for after in _EDGES
        ]
        return all(self._segments_of(text) == list(self.whole(text)) for text in texts)


def without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which has no UTF-8 and no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
