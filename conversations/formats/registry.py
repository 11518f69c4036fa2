"""All call formats, by name.

A format is one module with a `FORMAT`; it is listed here and nowhere else. If two formats read the
calls of a template and agree on everything, the earlier one is taken.
"""

from __future__ import annotations

import difflib

from conversations.errors import CallFormatError
from conversations.formats import (
    deepseek_v4,
    deepseek_v32,
    functiongemma,
    gemma4,
    glm45,
    hermes,
    minimax_m2,
    qwen3_coder,
    seed_oss,
)
from conversations.formats.format import CallFormat

FORMATS: tuple[CallFormat, ...] = (
    hermes.FORMAT,
    qwen3_coder.FORMAT,
    glm45.FORMAT,
    minimax_m2.FORMAT,
    seed_oss.FORMAT,
    deepseek_v4.FORMAT,
    deepseek_v32.FORMAT,
    gemma4.FORMAT,
    functiongemma.FORMAT,
)

_BY_NAME = {name: each for each in FORMATS for name in (each.name, *each.aliases)}


def names() -> list[str]:
    """The names of all formats, without their aliases, in order."""
    return [each.name for each in FORMATS]


def format_named(name: str) -> CallFormat:
    """The format with this name or alias. Raises CallFormatError, naming the nearest right one."""
    if (named := _BY_NAME.get(name)) is None:
        close = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names())}"
        raise CallFormatError(f"there is no call format {name!r}; {hint}")
    return named
