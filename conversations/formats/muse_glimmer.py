"""Muse Glimmer: a row of messages, each with a recipient; calls in ATEM tags.

    to=self<|message|>a thought<|eom|><|start|>assistant to=NAME<|message|><atem:function_calls>...

Source: the model's chat template, which writes strings, numbers and `true`, `false`, `null` as they
are, lists and objects as JSON. Content is what is addressed to `user`, without its header. A header
that is addressed to a tool, with no call behind it, is a malformed call.
"""

from __future__ import annotations

from conversations.formats.blocks import Thought
from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<atem:function_calls>", "</atem:function_calls>"),
    call=('<atem:invoke name="', '">'),
    call_close="</atem:invoke>",
    parameter=('<atem:parameter name="', '">'),
    parameter_close="</atem:parameter>",
    several=True,
    frame=r"<\|start\|>assistant| to=[^\s<]{1,200}<\|message\|>|<\|eom\|>",
    header=r" to=(?!user<|self<)[^\s<]{1,200}<\|message\|>",
    thought=Thought(" to=self<|message|>", "<|eom|>"),
    example=(
        '<atem:function_calls>\n<atem:invoke name="NAME">\n'
        '<atem:parameter name="KEY">VALUE</atem:parameter>\n'
        "</atem:invoke>\n</atem:function_calls>"
    ),
)

FORMAT = tagged_format("muse_glimmer", TAGS)
