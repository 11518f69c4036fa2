"""Text that Unicode allows. JSON can hold half of a surrogate pair; UTF-8 and Arrow cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversations.encoding import without_lone_surrogates


def unicode_only(value: Any) -> Any:
    """The JSON value with U+FFFD for each half of a surrogate pair, in keys as well."""
    if isinstance(value, str):
        return without_lone_surrogates(value)
    if isinstance(value, list):
        return [unicode_only(item) for item in value]
    if isinstance(value, Mapping):
        return {unicode_only(key): unicode_only(item) for key, item in value.items()}
    return value
