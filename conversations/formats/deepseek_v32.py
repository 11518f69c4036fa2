"""DeepSeek-V3.2: as DeepSeek-V4, but for the block's name. Source: the model's chat template."""

from __future__ import annotations

from conversations.formats.deepseek_v4 import dsml
from conversations.formats.tagged import tagged_format

TAGS = dsml("function_calls")

FORMAT = tagged_format("deepseek_v32", TAGS, ("deepseekv32",))
