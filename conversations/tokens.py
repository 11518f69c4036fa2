"""The token sequence of one conversation: append only, every token with its author.

Ids, authors and log-probs are appended together, in one place. `response_mask` and the segments are
views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

PROMPT, SAMPLED, TOOL, USER, TEMPLATE = "prompt", "sampled", "tool", "user", "template"
KINDS = (PROMPT, SAMPLED, TOOL, USER, TEMPLATE)


Piece = tuple[str, list[int]]
"""(kind, token ids): a run of tokens by one author."""


class TokenIds(list[int]):
    """Ids that only grow, as a list, and as JSON text that is kept: only new ids are written."""

    __slots__ = ("_texts", "_written")

    def __init__(self) -> None:
        super().__init__()
        self._texts: list[bytes] = []
        self._written = 0

    def json(self) -> bytes:
        """The ids as a JSON list without spaces."""
        if self._written < len(self):
            self._texts.append(orjson.dumps(self[self._written :])[1:-1])
            self._written = len(self)
        return b"[%b]" % b",".join(self._texts)


class TokenSequence:
    """The tokens that an engine sees: `ids` [N] = `prompt_ids + response_ids`.

    The response starts at the first sampled token.
    """

    __slots__ = ("_kinds", "_logprobs", "_starts", "ids", "prompt_length")

    def __init__(self) -> None:
        self.ids = TokenIds()
        self.prompt_length: int | None = None
        self._kinds: list[str] = []
        self._starts: list[int] = []
        self._logprobs: list[tuple[int, list[float]]] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def response_length(self) -> int:
        """Tokens after the prompt."""
        return 0 if self.prompt_length is None else len(self.ids) - self.prompt_length

    def append(self, kind: str, ids: Sequence[int]) -> None:
        """Appends tokens that were not sampled."""
        if not ids:
            return
        if not self._kinds or self._kinds[-1] != kind:
            self._kinds.append(kind)
            self._starts.append(len(self.ids))
        self.ids.extend(ids)

    def append_sampled(self, ids: Sequence[int], logprobs: list[float]) -> None:
        """Appends sampled tokens, `ids` [T] with `logprobs` [T]. The first call ends the prompt."""
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} sampled ids with {len(logprobs)} log-probs")
        if self.prompt_length is None:
            self.prompt_length = len(self.ids)
        self._logprobs.append((len(self.ids), logprobs))
        self.append(SAMPLED, ids)

    def segments(self) -> list[tuple[str, int, int]]:
        """The runs of tokens by one author, (kind, start, end), in order and without gaps."""
        ends = [*self._starts[1:], len(self.ids)]
        return list(zip(self._kinds, self._starts, ends, strict=True)) if self._kinds else []

    def columns(self) -> dict[str, Any]:
        """The sequence as a record's or a branch's fields hold it."""
        return {
            "prompt_ids": self.prompt_ids(),
            "response_ids": self.response_ids(),
            "response_mask": self.response_mask(),
            "response_logprobs": self.response_logprobs(),
            "segments": self.segments(),
        }

    def prompt_ids(self) -> list[int]:
        """Everything before the first sampled token."""
        return self.ids[: self.prompt_length]

    def response_ids(self) -> list[int]:
        """Everything from the first sampled token on."""
        return [] if self.prompt_length is None else self.ids[self.prompt_length :]

    def response_mask(self) -> list[int]:
        """1 exactly where the engine sampled the token, [len(response_ids)]."""
        mask = [0] * self.response_length
        for start, logprobs in self._logprobs:
            offset = start - (self.prompt_length or 0)
            mask[offset : offset + len(logprobs)] = [1] * len(logprobs)
        return mask

    def response_logprobs(self) -> list[float | None]:
        """The engine's log-prob of each sampled token, None elsewhere, [len(response_ids)]."""
        values: list[float | None] = [None] * self.response_length
        for start, logprobs in self._logprobs:
            offset = start - (self.prompt_length or 0)
            values[offset : offset + len(logprobs)] = logprobs
        return values
