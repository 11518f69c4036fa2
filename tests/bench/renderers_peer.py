"""CPU of a turn's parse in the package `renderers`, for `tests.bench.call_formats`.

Runs in an environment that has the package (`renderers.txt`). Stdin has a JSON object: `tokenizer`,
a folder, `tools`, and `turns`, {format: {turn: text}}. Stdout gets {format: {turn: milliseconds}},
without the formats that the package does not read. Its parsers take ids: the tokenizer gets the
formats' control tokens, and encoding is not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.bench.cpu import cpu_ms

_KIMI = {
    "tool_calls_section_begin_id": "<|tool_calls_section_begin|>",
    "tool_calls_section_end_id": "<|tool_calls_section_end|>",
    "tool_call_begin_id": "<|tool_call_begin|>",
    "tool_call_argument_begin_id": "<|tool_call_argument_begin|>",
    "tool_call_end_id": "<|tool_call_end|>",
}
_DEEPSEEK = {
    "tool_calls_begin_id": "<｜tool▁calls▁begin｜>",
    "tool_calls_end_id": "<｜tool▁calls▁end｜>",
    "tool_call_begin_id": "<｜tool▁call▁begin｜>",
    "tool_call_end_id": "<｜tool▁call▁end｜>",
    "tool_sep_id": "<｜tool▁sep｜>",
}
_HARMONY = {
    f"{name}_id": f"<|{name}|>"
    for name in ("return", "call", "start", "end", "channel", "message", "constrain")
}
_CALL = {"tool_call_id": "<tool_call>", "tool_call_end_id": "</tool_call>"}
_THINK = {"think_id": "<think>", "think_end_id": "</think>"}
_GLM = {
    "arg_key_id": "<arg_key>",
    "arg_key_end_id": "</arg_key>",
    "arg_value_id": "<arg_value>",
    "arg_value_end_id": "</arg_value>",
}
_MINIMAX = {"tool_call_id": "<minimax:tool_call>", "tool_call_end_id": "</minimax:tool_call>"}

TYPED = {
    "qwen3_coder": ("parse_qwen35", {**_CALL, **_THINK}),
    "glm45": ("parse_glm", {**_CALL, **_THINK, **_GLM}),
    "minimax_m2": ("parse_minimax", {**_MINIMAX, **_THINK}),
}
"""Parsers that are given the tools, and the tokens of their arguments."""

UNTYPED = {
    "hermes": ("parse_qwen3", _CALL),
    "kimi_k2": ("parse_kimi_k2", _KIMI),
    "deepseek_v3": ("parse_deepseek_v3", _DEEPSEEK),
    "deepseek_v31": ("parse_deepseek_v3", _DEEPSEEK),
    "gpt_oss": ("parse_gpt_oss", _HARMONY),
}


def main() -> None:
    asked = json.load(sys.stdin)
    found = {}
    for form, turns in asked["turns"].items():
        if (parse := parser_of(form, asked["tokenizer"], asked["tools"])) is not None:
            found[form] = {turn: milliseconds(*parse, text) for turn, text in turns.items()}
    json.dump(found, sys.stdout)


def parser_of(
    form: str, folder: str, tools: list[dict[str, Any]]
) -> tuple[Any, Callable[[list[int]], Any]] | None:
    """A tokenizer with the format's tokens, and the package's parser; None if it has none."""
    from renderers import parsing
    from transformers import AddedToken, AutoTokenizer

    name, tokens = {**TYPED, **UNTYPED}.get(form, ("", {}))
    if not name:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in tokens.values()])
    named: dict[str, Any] = {
        key: tokenizer.convert_tokens_to_ids(text) for key, text in tokens.items()
    }
    named |= {"tools": tools} if form in TYPED else {}
    named |= {} if form == "gpt_oss" else {"stop_ids": {tokenizer.eos_token_id}}
    return tokenizer, lambda ids: getattr(parsing, name)(tokenizer, ids, **named)


def milliseconds(tokenizer: Any, parse: Callable[[list[int]], Any], text: str) -> float | None:
    """None if the parser finds no call."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return cpu_ms(lambda: parse(ids)) if parse(ids).tool_calls else None


if __name__ == "__main__":
    main()
