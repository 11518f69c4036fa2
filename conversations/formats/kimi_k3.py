"""Kimi-K3: `<|open|>NAME<|sep|>...<|close|>NAME<|sep|>` around everything, calls in one block.

Source: the model's chat template. A parameter says its type: a string stands verbatim, every other
value is JSON. An answer stands in `response`, the turn in `message`; neither is content. The prompt
opens the thought.
"""

from __future__ import annotations

from conversations.formats.blocks import Thought
from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    call=('<|open|>call tool="', r'" index="\d{1,9}"<\|sep\|>'),
    call_close="<|close|>call<|sep|>",
    parameter=('<|open|>argument key="', r'" type="(\w+)"<\|sep\|>'),
    parameter_close="<|close|>argument<|sep|>",
    several=True,
    strict=True,
    string_mark="string",
    frame=r"<\|(?:open|close)\|>(?:response|message)<\|sep\|>",
    thought=Thought("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    example=(
        '<|open|>tools<|sep|><|open|>call tool="NAME" index="1"<|sep|>'
        '<|open|>argument key="KEY" type="string"<|sep|>VALUE<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>"
    ),
)

FORMAT = tagged_format("kimi_k3", TAGS)
