"""The token ids of a path as runs that are shared, never copied: as numbers, and as JSON text.

Each run keeps its ids (4 bytes a token) and, once it was asked for, their JSON text. A prompt that
grows by one turn makes the text of the new runs alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import overload

import orjson


class IdRun:
    """A run of token ids that does not change."""

    __slots__ = ("_json", "ids")

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids if isinstance(ids, array) else array("I", ids)
        self._json: bytes | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def json(self) -> bytes:
        """The ids as JSON without brackets: `b"1,2,3"`."""
        if self._json is None:
            self._json = orjson.dumps(self.ids.tolist())[1:-1]
        return self._json


class PathIds(Sequence[int]):
    """The ids of runs, one after the other. `json()` is what a server wants as `input_ids`."""

    __slots__ = ("_length", "runs")

    def __init__(self, runs: Sequence[IdRun]) -> None:
        self.runs = tuple(run for run in runs if len(run))
        self._length = sum(map(len, self.runs))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(run.ids for run in self.runs)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.to_list()[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and self.to_list() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def to_list(self) -> list[int]:
        """The ids as a list, copied."""
        return list(self)

    def json(self) -> bytes:
        """The ids as a JSON list, joined from the texts of the runs: one copy."""
        parts = [b"["]
        for run in self.runs:
            parts += (run.json, b",")
        parts[-1] = b"]" if self.runs else b"[]"
        return b"".join(parts)
