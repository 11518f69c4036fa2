"""MiniCPM5: `<function name="NAME"><param name="KEY">VALUE</param></function>`, no block around it.

Source: the model's chat template. A string with `<`, `&` or a newline stands in
`<![CDATA[...]]>`, another one verbatim; every other value as Python prints it.
"""

from __future__ import annotations

from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=('<function name="', "</function>"),
    call=("", '">'),
    call_close="",
    parameter=('<param name="', '">'),
    parameter_close="</param>",
    cdata=True,
    strict=True,
    example='<function name="NAME"><param name="KEY">VALUE</param></function>',
)

FORMAT = tagged_format("minicpm5", TAGS)
