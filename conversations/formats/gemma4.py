"""Gemma-4: `<|tool_call>call:NAME{key:<|"|>text<|"|>}<tool_call|>`, thoughts in channels.

Source: the model's chat template. Rules and what is malformed: `call_braces.py`.
"""

from __future__ import annotations

from conversations.formats.blocks import Thought
from conversations.formats.call_braces import BraceTokens, braces_format

TOKENS = BraceTokens(
    open="<|tool_call>",
    close="<tool_call|>",
    quote='<|"|>',
    thought=Thought("<|channel>", "<channel|>"),
)

FORMAT = braces_format("gemma4", TOKENS)
