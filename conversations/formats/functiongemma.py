"""FunctionGemma: `<start_function_call>call:NAME{key:<escape>text<escape>}<end_function_call>`.

Source: the model's chat template. Rules and what is malformed: `call_braces.py`.
"""

from __future__ import annotations

from conversations.formats.blocks import THINK
from conversations.formats.call_braces import BraceTokens, braces_format

TOKENS = BraceTokens(
    open="<start_function_call>", close="<end_function_call>", quote="<escape>", thought=THINK
)

FORMAT = braces_format("functiongemma", TOKENS)
