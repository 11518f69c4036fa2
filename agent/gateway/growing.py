"""Bodies of one session, of which each mostly is the last one with more messages.

A program sends its whole history each turn, byte for byte as before. Of such a body only the added
messages are read: what it costs does not grow with the history.

Why that is exact: a body that was read whole is cut into `head [ messages ] tail`, and the two are
proven apart: the list is JSON, and `head [] tail` is a body whose list is empty. A later body
`head [ messages , added ] tail` is then the same body with more messages if `[ added ]` is a list.
Whatever else comes is read whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import orjson

from agent.gateway.dialect import ApiDialect
from agent.gateway.request import Refusal, TurnRequest, has_rounded

MAX_KEPT_BYTES = 4 << 20
"""A longer body, one with images, is not kept."""
_CUTS = 3
"""A program whose bodies were cut so often, and never continued, sends others."""
_LIST = re.compile(rb'"messages"\s*:\s*(?=\[)')
_BLANKS = b" \t\r\n"
_decoder = json.JSONDecoder()


@dataclass(slots=True)
class _Cut:
    """A body: `parts` up to its last message, `end` from there on, what it asks."""

    dialect: ApiDialect
    parts: list[bytes]
    end: bytes
    request: TurnRequest
    length: int
    """Bytes of `parts`."""


class BodyReader:
    """Reads the bodies of one session."""

    def __init__(self) -> None:
        self._last: _Cut | None = None
        self._cuts = 0

    def read(self, dialect: ApiDialect, raw: bytes) -> TurnRequest:
        """The request in a body, as `dialect.read` reads it. Raises Refusal."""
        if request := self._longer(dialect, raw):
            self._cuts = 0
            return request
        request = dialect.read(raw)
        self._last = None
        if dialect.more and self._cuts < _CUTS and len(raw) <= MAX_KEPT_BYTES:
            self._cuts += 1
            self._last = _cut(dialect, raw, request)
        return request

    def _longer(self, dialect: ApiDialect, raw: bytes) -> TurnRequest | None:
        """The request if the body is the last one with more messages, else None."""
        last = self._last
        if (
            last is None
            or dialect.more is None
            or last.dialect is not dialect
            or not last.length + len(last.end) < len(raw) <= MAX_KEPT_BYTES
            or not raw.endswith(last.end)
        ):
            return None
        at = 0
        for part in last.parts:
            if not raw.startswith(part, at):
                return None
            at += len(part)
        added = raw[at : len(raw) - len(last.end)]
        blanks, comma, listed = added.partition(b",")
        if blanks.strip(_BLANKS) or not comma:
            return None
        try:
            messages = orjson.loads(b"[%b]" % listed)
            if not messages or has_rounded(messages):
                return None
            last.request = dialect.more(last.request, messages)
        except (Refusal, ValueError, RecursionError):  # read whole, it says where the mistake is
            return None
        last.parts.append(added)
        last.length += len(added)
        return last.request


def _cut(dialect: ApiDialect, raw: bytes, request: TurnRequest) -> _Cut | None:
    """The parts of a body that was read, None if they cannot be told apart."""
    found = _LIST.search(raw)
    if found is None:
        return None
    start = found.end()
    try:
        text = raw[start:].decode()
        messages, length = _decoder.raw_decode(text)
        end = start + len(text[:length].encode())
        rest = orjson.loads(raw[:start] + b"[]" + raw[end:])
    except (ValueError, RecursionError):
        return None
    if not messages or rest.get("messages") != []:
        return None
    given = raw[: end - 1].rstrip(_BLANKS)
    return _Cut(dialect, [given], raw[len(given) :], request, len(given))
