"""Untrusted text for a terminal: what would move the cursor, change colours or turn the reading direction is shown, not done."""

from __future__ import annotations

import re

_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with control characters, direction marks and lone surrogates as signs; newline and tab stay."""
    return _ACTS.sub(_sign, text)


def one_line(text: str) -> str:
    """The same on one line, newline and tab shown as well."""
    return visible(text).replace("\n", "\u240a").replace("\t", "\u2409")


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"
