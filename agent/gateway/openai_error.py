"""Refusals as OpenAI's APIs tell them."""

from __future__ import annotations

from typing import Any

from agent.gateway.answer import json_bytes
from agent.gateway.request import Refusal

_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "server_error"}


def openai_error_object(refusal: Refusal) -> dict[str, Any]:
    """A refusal as OpenAI's APIs tell it."""
    return {
        "message": refusal.message,
        "type": _TYPES.get(refusal.status, "invalid_request_error"),
        "param": refusal.field,
        "code": refusal.code,
    }


def openai_error(refusal: Refusal) -> bytes:
    """The body of a refusal."""
    return json_bytes({"error": openai_error_object(refusal)})
