"""Qwen3-Coder, Qwen3.5, Qwen3.6, Qwen3.8, Nemotron-3, Step-3.5: a function in a `<tool_call>`,
parameters in tags.

Source: the chat templates of these models. Each value has a newline of its own at each end.
Numbers, booleans and null are written as Python prints them, objects and arrays as JSON. Rules and
what is malformed: `tagged.py`.
"""

from __future__ import annotations

from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<tool_call>", "</tool_call>"),
    call=("<function=", ">"),
    call_close="</function>",
    parameter=("<parameter=", ">"),
    parameter_close="</parameter>",
    newlines=True,
    example=(
        "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n"
        "</tool_call>"
    ),
)

FORMAT = tagged_format("qwen3_coder", TAGS, ("qwen3_xml", "step3p5"))
