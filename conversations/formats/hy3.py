"""Hunyuan 3: GLM's keys and values, all calls of a turn in one block, every tag `:opensource`.

Source: the model's chat template. A string stands verbatim, every other value is JSON.
"""

from __future__ import annotations

from conversations.formats.blocks import Thought
from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<tool_calls:opensource>", "</tool_calls:opensource>"),
    call=("<tool_call:opensource>", "<tool_sep:opensource>"),
    call_close="</tool_call:opensource>",
    parameter=("<arg_key:opensource>", r"</arg_key:opensource>\s*<arg_value:opensource>"),
    parameter_close="</arg_value:opensource>",
    several=True,
    thought=Thought("<think:opensource>", "</think:opensource>"),
    example=(
        "<tool_calls:opensource>\n<tool_call:opensource>NAME<tool_sep:opensource>\n"
        "<arg_key:opensource>KEY</arg_key:opensource>\n"
        "<arg_value:opensource>VALUE</arg_value:opensource>\n"
        "</tool_call:opensource>\n</tool_calls:opensource>"
    ),
)

FORMAT = tagged_format("hy3", TAGS)
