"""Trajectories that were there before: exactly, or nearly. The first of several stays.

Exactly: the same token ids (without ids: the same messages). Nearly: the Jaccard similarity of their 5-word shingles, over everything
said but system messages, is about 0.8 or more (MinHash with 128 permutations in an LSH index, by rensa).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from conversations.errors import ExportError
from conversations.trajectory import canonical_json

THRESHOLD, PERMUTATIONS, BANDS, SHINGLE = 0.8, 128, 16, 5
"""16 bands of 8 rows: two texts of similarity 0.8 are compared with probability 0.95, two of 0.5 with 0.06."""

_WORD = re.compile(r"\w+|[^\w\s]")


class ExactDuplicates:
    """Remembers 16 bytes a trajectory."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def seen(self, record: Mapping[str, Any]) -> bool:
        """Whether the same was asked before; remembers it."""
        ids = [record["prompt_ids"], record["response_ids"]]
        content = canonical_json(ids if any(ids) else record["messages"])
        digest = hashlib.blake2b(content.encode("ascii"), digest_size=16).digest()
        known = digest in self._hashes
        self._hashes.add(digest)
        return known


class NearDuplicates:
    """Remembers about 2.5 KB for each trajectory that is not like an earlier one."""

    def __init__(self) -> None:
        try:
            from rensa import RMinHash, RMinHashDeduplicator  # type: ignore[import-untyped]
        except ImportError as error:
            raise ExportError(
                "near duplicates are found with rensa, which is not installed: pip install rensa"
            ) from error
        self._minhash = RMinHash
        self._index = RMinHashDeduplicator(THRESHOLD, PERMUTATIONS, True, BANDS)

    def seen(self, record: Mapping[str, Any]) -> bool:
        """Whether something like it was asked before; remembers it where not."""
        minhash = self._minhash(num_perm=PERMUTATIONS, seed=42)
        minhash.update(_shingles(record["messages"]))
        return not self._index.add(record["id"], minhash)


def _shingles(messages: list[dict[str, Any]]) -> list[str]:
    said = "\n".join(
        str(message.get("raw") or message["content"])
        for message in messages
        if message["role"] != "system"
    )
    words = _WORD.findall(said)
    return [
        " ".join(words[start : start + SHINGLE])
        for start in range(max(1, len(words) - SHINGLE + 1))
    ]
