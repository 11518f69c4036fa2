"""DeepSeek-V4: DSML tags, all calls of a turn in one block; parameters say if they are strings.

Source: the model's chat template. `string="true"`: the value is the text, verbatim;
`string="false"`: JSON, whatever the tool's schema says. A parameter without the attribute is read
by its schema.
"""

from __future__ import annotations

from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format


def dsml(block: str) -> Tags:
    """The tags, with the name of the block."""
    return Tags(
        block=(f"<｜DSML｜{block}>", f"</｜DSML｜{block}>"),
        call=('<｜DSML｜invoke name="', '">'),
        call_close="</｜DSML｜invoke>",
        parameter=('<｜DSML｜parameter name="', r'"(?:\s+string="(true|false)")?>'),
        parameter_close="</｜DSML｜parameter>",
        several=True,
        example=(
            f'<｜DSML｜{block}>\n<｜DSML｜invoke name="NAME">\n'
            '<｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>\n'
            f"</｜DSML｜invoke>\n</｜DSML｜{block}>"
        ),
    )


TAGS = dsml("tool_calls")

FORMAT = tagged_format("deepseek_v4", TAGS, ("deepseekv4",))
