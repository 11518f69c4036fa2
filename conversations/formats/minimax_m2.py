"""MiniMax-M2: all calls of a turn in one `<minimax:tool_call>`, each in an `<invoke>`.

Source: the model's chat template. A string stands verbatim, every other value is JSON.
"""

from __future__ import annotations

from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<minimax:tool_call>", "</minimax:tool_call>"),
    call=('<invoke name="', '">'),
    call_close="</invoke>",
    parameter=('<parameter name="', '">'),
    parameter_close="</parameter>",
    several=True,
    example=(
        '<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    ),
)

FORMAT = tagged_format("minimax_m2", TAGS, ("minimax-m2",))
