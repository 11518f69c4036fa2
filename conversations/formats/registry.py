"""All call formats, by name.

Formats are listed here and nowhere else. If two formats read the
calls of a template and agree on everything, the earlier one is taken.
"""

from __future__ import annotations

import difflib

from conversations.errors import CallFormatError
from conversations.formats import (
    bare_json,
    deepseek_v4,
    deepseek_v32,
    functionary,
    functiongemma,
    gemma4,
    glm45,
    gpt_oss,
    hermes,
    hy3,
    json_lists,
    kimi_k3,
    minicpm5,
    minimax_m2,
    mistral,
    muse_glimmer,
    pythonic,
    qwen3_coder,
    sections,
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
    hy3.FORMAT,
    kimi_k3.FORMAT,
    muse_glimmer.FORMAT,
    minicpm5.FORMAT,
    gemma4.FORMAT,
    functiongemma.FORMAT,
    sections.KIMI_K2,
    sections.DEEPSEEK_V3,
    sections.DEEPSEEK_V31,
    gpt_oss.FORMAT,
    mistral.FORMAT,
    functionary.FUNCTIONARY_V31,
    functionary.FUNCTIONARY_V32,
    pythonic.LFM2,
    *json_lists.FORMATS,
    bare_json.LLAMA3_JSON,
    bare_json.JSON_LIST,
    pythonic.LLAMA4_PYTHONIC,
)

_BY_NAME = {name: each for each in FORMATS for name in (each.name, *each.aliases)}


def format_names() -> list[str]:
    """The names of all formats, without their aliases, in order."""
    return [each.name for each in FORMATS]


def format_named(name: str) -> CallFormat:
    """The format with this name or alias. Raises CallFormatError, naming the nearest right one."""
    if (named := _BY_NAME.get(name)) is None:
        close = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(format_names())}"
        raise CallFormatError(f"there is no call format {name!r}; {hint}")
    return named
