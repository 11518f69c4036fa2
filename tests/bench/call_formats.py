"""CPU a turn's parse takes in each call format, beside SGLang's detectors: python -m
tests.bench.call_formats

A short turn has one call with three small arguments, a long one 5,400 characters of code. SGLang's
detectors report no malformed call, so they do less. Nothing is asserted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from conversations.formats.format import ParameterTypes
from conversations.formats.registry import format_named
from tests.conversations.formats.written import WRITERS, tool_schema

TOOL = tool_schema(
    "look",
    {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "options": {"type": "object"},
        "code": {"type": "string"},
    },
)
_FUNCTION = "def function(x, y):\n    if x > y:\n        return [x, y]\n    return y\n"
TURNS: dict[str, dict[str, Any]] = {
    "short": {"city": "Paris", "days": 3, "options": {"a": [1, 2]}},
    "long": {"city": "Paris", "days": 3, "code": _FUNCTION * 75},
}
DETECTORS = {
    "qwen3_coder": "qwen3_coder",
    "glm45": "glm45",
    "minimax_m2": "minimax-m2",
    "kimi_k2": "kimi_k2",
    "deepseek_v31": "deepseekv31",
    "deepseek_v3": "deepseekv3",
    "gpt_oss": "gpt-oss",
    "llama3_json": "llama3",
    "llama4_pythonic": "pythonic",
    "hermes": "qwen25",
}


def cpu_ms(call: Callable[[], object], repeats: int = 300) -> float:
    """The least of five runs' means, in milliseconds of CPU."""
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, time.process_time() - started)
    return best / repeats * 1000


def sglang_ms(name: str, text: str) -> str:
    """The same for SGLang's detector of this format, a dash if it has none."""
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    if name not in DETECTORS:
        return "-"
    detector = FunctionCallParser.ToolCallParserEnum[DETECTORS[name]]
    tools = [Tool(**TOOL)]
    return f"{cpu_ms(lambda: detector().detect_and_parse(text, tools)):.4f}"


def main() -> None:
    types = ParameterTypes.of([TOOL])
    print(f"{'format':16}{'turn':8}{'characters':>10}{'ours ms':>10}{'SGLang ms':>11}")
    for name, write in WRITERS.items():
        parse = format_named(name).parse
        for turn, arguments in TURNS.items():
            text = write([("look", arguments)])
            ours = cpu_ms(lambda parse=parse, text=text: parse(text, types))  # type: ignore[misc]
            print(f"{name:16}{turn:8}{len(text):10}{ours:10.4f}{sglang_ms(name, text):>11}")


if __name__ == "__main__":
    main()
