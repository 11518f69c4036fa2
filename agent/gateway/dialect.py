"""What a dialect is: how it reads a request, and how it writes an answer, a stream, an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.gateway.answer import Answer
from agent.gateway.request import Refusal, TurnRequest


@dataclass(frozen=True, slots=True)
class ApiDialect:
    """One API's wire format.

    `read` raises Refusal. `whole` is the body of an answer without a stream, `stream` all server
    sent events of one with a stream. `error` is the body of a refusal, `error_event` the same in a
    stream that has begun. `keep_alive` keeps a stream open until its answer is there. `response_id`
    is the id that the client sees of an answer's name. `more` is a request with `messages` of a
    body added, exactly as `read` reads them after those that it has; it raises Refusal, ValueError
    for what is no message. None if messages are not read one by one.
    """

    name: str
    read: Callable[[bytes], TurnRequest]
    whole: Callable[[Answer, TurnRequest], bytes]
    stream: Callable[[Answer, TurnRequest], bytes]
    error: Callable[[Refusal], bytes]
    error_event: Callable[[Refusal], bytes]
    keep_alive: bytes
    response_id: Callable[[str], str]
    more: Callable[[TurnRequest, list[Any]], TurnRequest] | None = None
