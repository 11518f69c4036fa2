"""GLM-4.5 to GLM-5, Ling-3, Spark-2.5, Laguna: the name stands in the block, then keys and values
in turn.

Source: the chat templates of these models; GLM-4.5 and 4.6 write newlines between the tags, GLM-4.7
and later do not. A string stands verbatim, every other value is JSON.
"""

from __future__ import annotations

from conversations.formats.tag_grammar import Tags
from conversations.formats.tagged import tagged_format

TAGS = Tags(
    block=("<tool_call>", "</tool_call>"),
    call=("", r"(?=\s*(?:<arg_key>|</tool_call>))"),
    call_close="",
    parameter=("<arg_key>", r"</arg_key>\s*<arg_value>"),
    parameter_close="</arg_value>",
    example=("<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>"),
)

FORMAT = tagged_format("glm45", TAGS, ("glm", "glm47", "ling3", "spark25", "poolside_v1"))
