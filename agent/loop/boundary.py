"""What tools answer, as what the record may hold: text, a finite number, plain JSON; and exceptions as text.

A tool is foreign code: each of these takes anything, and raises TypeError where it is not what the contract says.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

from conversations.encoding import without_lone_surrogates
from conversations.trajectory import canonical_json

FLOAT32_MAX = 3.4028234663852886e38


def text_of(response: object) -> str:
    """The text of a tool's answer: a `ToolResponse` (ours or verl's) or a plain string; with no half surrogates."""
    text = response if isinstance(response, str) else getattr(response, "text", text_of)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"expected a ToolResponse with text, got {type(response).__name__}")
    return without_lone_surrogates(text)


def utf8_size(text: str) -> int:
    """How many bytes a text without half surrogates is."""
    return len(text) if text.isascii() else len(text.encode())


def finite(value: object) -> float:
    """A reward as a number that has a float32, as trainers keep it; so sums are finite too. numpy's scalars have `item`."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)) and abs(value) <= FLOAT32_MAX:
        return float(value)
    raise TypeError(f"expected a finite number as reward, got {value!r:.100}")


def json_metrics(metrics: object) -> dict[str, Any]:
    """The metrics as plain JSON; what has no JSON form becomes its text."""
    if not metrics:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"expected a dict of metrics, got {type(metrics).__name__}")
    return {str(key): _json_value(value) for key, value in metrics.items()}


def _json_value(value: object) -> Any:
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError):
        return _say(value)[:1000]


def describe(error: BaseException) -> str:
    """An exception for the record: its class, message and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    cause = (
        f" from {type(error.__cause__).__name__}: {_say(error.__cause__)}"
        if error.__cause__
        else ""
    )
    return f"{type(error).__name__}: {_say(error)}{where}{cause}"[:2000]


def _say(value: object) -> str:
    """`str`, of things whose own text may fail."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} without a text>"
