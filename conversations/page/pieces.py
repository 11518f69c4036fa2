"""The text of each token id. A token may be half a character, so a piece is bytes.

Invariant: an id's piece does not depend on its neighbours; an id that the tokenizer does not know
has none.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Piece = str | list[int]
"""Text, or the bytes of a piece that is no UTF-8 by itself."""


def pieces(tokenizer_json: Path, ids: Iterable[int]) -> dict[str, Any]:
    """`{"ids": [...], "pieces": [...], "special": [...]}` of the `ids` that the tokenizer knows.

    Empty if the tokenizer cannot be read.
    """
    read = _reader(tokenizer_json)
    if read is None:
        return {"ids": [], "pieces": [], "special": []}
    known = sorted(token for token in ids if type(token) is int and read.bytes(token) is not None)
    return {
        "ids": known,
        "pieces": [_piece(read.bytes(token) or b"") for token in known],
        "special": sorted(read.special & set(known)),
    }


def _piece(raw: bytes) -> Piece:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


class _Reader:
    """A `tokenizer.json` as a table.

    Byte-level BPE and byte-fallback vocabularies are read to the byte, others as they are.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        added = {token["id"]: token for token in document.get("added_tokens", [])}
        self.special = {token_id for token_id, token in added.items() if token.get("special")}
        self._added = {token_id: str(token["content"]) for token_id, token in added.items()}
        vocab = document["model"]["vocab"]
        self._tokens = (
            {place: token for token, place in vocab.items()}
            if isinstance(vocab, dict)
            else dict(enumerate(v[0] for v in vocab))
        )
        self._byte_level = _BYTES if '"ByteLevel"' in json.dumps(document.get("decoder")) else None

    def bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode(errors="replace")
        token = self._tokens.get(token_id)
        if token is None:
            return None
        if self._byte_level is not None and all(char in self._byte_level for char in token):
            return bytes(self._byte_level[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode(errors="replace")


def _reader(file: Path) -> _Reader | None:
    try:
        return _parsed(file.read_bytes())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


@functools.lru_cache(1)
def _parsed(content: bytes) -> _Reader:
    """The next page is of a run with the same tokenizer: another step, or this one, further on."""
    return _Reader(json.loads(content.decode()))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: itself if it prints, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(0x100 + place): byte for place, byte in enumerate(others)},
    }


_BYTES = _byte_alphabet()
