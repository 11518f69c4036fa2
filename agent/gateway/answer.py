"""A sampled turn as every dialect tells it to a client."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

Finish = Literal["stop", "calls", "length"]


@dataclass(frozen=True, slots=True)
class AnsweredCall:
    """A call as the client gets it. `arguments` is JSON text, or what a malformed one said."""

    id: str
    name: str
    arguments: str
    malformed: bool = False

    def object(self) -> dict[str, Any]:
        """The arguments as an object."""
        if self.malformed:
            return {"raw": self.arguments}
        found: dict[str, Any] = json.loads(self.arguments)  # orjson rounds integers from 2^64 on
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn. `name` is `{session}-{turn}`; token counts are those of this turn."""

    name: str
    content: str
    reasoning: str | None
    calls: tuple[AnsweredCall, ...]
    finish: Finish
    prompt_tokens: int
    sampled_tokens: int
    cached_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def signature(self) -> str:
        """Unique to the turn: clients tell thoughts apart by it."""
        return base64.b64encode(self.name.encode()).decode()


def input_of(call: AnsweredCall) -> str:
    """The text that is the argument of a `text_tool`; whatever else the model wrote as it is."""
    given = None if call.malformed else call.object().get("input")
    return given if isinstance(given, str) else call.arguments


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The value as JSON."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(value).encode()
