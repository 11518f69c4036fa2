"""Seed-OSS: as Qwen3-Coder, in `<seed:tool_call>` and without newlines around values.

Source: the model's chat template, which writes every value that is not a string as Python prints
it.
"""

from __future__ import annotations

from conversations.formats.blocks import Thought
from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<seed:tool_call>", "</seed:tool_call>"),
    call=("<function=", ">"),
    call_close="</function>",
    parameter=("<parameter=", ">"),
    parameter_close="</parameter>",
    thought=Thought("<seed:think>", "</seed:think>"),
    example=(
        "<seed:tool_call>\n<function=NAME>\n<parameter=KEY>VALUE</parameter>\n</function>\n"
        "</seed:tool_call>"
    ),
)

FORMAT = tagged_format("seed_oss", TAGS)
