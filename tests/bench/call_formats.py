"""CPU a turn's parse takes in each call format, beside two peers.

    python -m tests.bench.call_formats

A short turn has one call with three small arguments, a long one 5,400 characters of code. The peers
are SGLang's detectors, which report no malformed call, and the package `renderers`, which reads ids
and runs in an environment of its own (renderers.txt; its column is empty if pip cannot get it).
Nothing is asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.model.base import base_model_dir
from conversations.formats.format import ParameterTypes
from conversations.formats.registry import format_named
from tests.agent import overlay
from tests.bench.cpu import cpu_ms
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


def sglang_ms(name: str, text: str) -> str:
    """The same for SGLang's detector of this format, a dash if it has none."""
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    if name not in DETECTORS:
        return "-"
    detector = FunctionCallParser.ToolCallParserEnum[DETECTORS[name]]
    tools = [Tool(**TOOL)]
    return f"{cpu_ms(lambda: detector().detect_and_parse(text, tools)):.4f}"


def for_peers(name: str, text: str) -> str:
    """The text as the peers want it: gpt-oss' with what the generation prompt holds."""
    return f"<|start|>assistant{text}" if name == "gpt_oss" else text


def renderers_ms(turns: dict[str, dict[str, str]]) -> dict[str, dict[str, float | None]]:
    """The same for `renderers`, by format and turn; empty, with a line, if it cannot be had."""
    turns = {
        name: {turn: for_peers(name, text) for turn, text in each.items()}
        for name, each in turns.items()
    }
    asked = {"tokenizer": str(base_model_dir()), "tools": [TOOL], "turns": turns}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.renderers_peer"],
            env=overlay.variables(Path(__file__).parent / "renderers.txt"),
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=600,
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"renderers is left out: {error}")
        return {}
    found: dict[str, dict[str, float | None]] = json.loads(done.stdout)
    return found


def main() -> None:
    types = ParameterTypes.of([TOOL])
    texts = {
        name: {turn: write([("look", arguments)]) for turn, arguments in TURNS.items()}
        for name, write in WRITERS.items()
    }
    peer = renderers_ms(texts)
    head = f"{'format':16}{'turn':8}{'characters':>10}{'ours ms':>10}{'SGLang ms':>11}"
    print(f"{head}{'renderers ms':>14}")
    for name, turns in texts.items():
        parse = format_named(name).parse
        for turn, text in turns.items():
            ours = cpu_ms(lambda parse=parse, text=text: parse(text, types))  # type: ignore[misc]
            theirs = peer.get(name, {}).get(turn)
            shown = "-" if theirs is None else f"{theirs:.4f}"
            sglang = sglang_ms(name, for_peers(name, text))
            row = f"{name:16}{turn:8}{len(text):10}{ours:10.4f}"
            print(f"{row}{sglang:>11}{shown:>14}", flush=True)


if __name__ == "__main__":
    main()
