"""The workload of the loop's rows, the same for both contenders: turns of 60 tokens with one hermes
call each.

The engine costs nothing and the tool does nothing, so what is measured is what a runtime adds.
Turns differ in their numbers alone, and so do the tool's answers: all as long as each other, no
answer twice.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from agent.engines.engine import Generation, SamplingParams
from agent.loop.tasks import Task
from agent.model.base import base_model_dir
from conversations.template import ChatTemplate
from tests.helpers import float32, npm_models, tokenizer_at
from tools.base import BaseTool, ToolResponse

TOOL_NAME = "code_interpreter"
TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Runs Python code and returns what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code."}},
            "required": ["code"],
        },
    },
}
VARIANTS = 64
_CODE = "x = {number}\ny = x * 3 + 1\nz = [x, y]\nprint(sum(z))\nprint(max(z) - 2)"


_numbers = itertools.count(100_000)


def answer() -> str:
    """What the tool of either contender answers: never the same twice, always as long."""
    return f"x = {next(_numbers)}"


class EchoTool(BaseTool):
    """Answers at once."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        return ToolResponse(answer()), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """`turns` are the variants of the one turn, each with its end token: 60 tokens with Qwen's
    tokenizer.
    """

    template: ChatTemplate
    tokenizer_name: str
    turns: tuple[Generation, ...]

    def respond(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """The next turn; the prompt's length tells turns apart."""
        return self.turns[len(prompt_ids) % VARIANTS]

    def floor_ms(self, repeats: int) -> float:
        """CPU ms of the least a turn needs: one decode, one encode of a tool's answer, one json of
        ids and log-probs.
        """
        block = (
            "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        work = [(self.turns[index % VARIANTS], block.format(answer())) for index in range(repeats)]
        started = process_time()
        for turn, text in work:
            self.template.decode(turn.token_ids)
            self.template.encode(text)
            json.dumps([turn.token_ids, turn.logprobs])
        return 1e3 * (process_time() - started) / repeats


@functools.cache
def workload() -> Workload:
    """With Qwen2.5's tokenizer out of the npm index, or SmolLM2's where that cannot be had.

    `TURNTRACE_BENCH_TOKENIZER` names the folder of another one, for machines without an index.
    """
    path, name = _tokenizer()
    template = ChatTemplate(tokenizer_at(path))
    template.use_fast_encoder()
    template.require_tools()  # as a run does before its first conversation
    return Workload(template, name, tuple(_turn(template, 10 + index) for index in range(VARIANTS)))


def _tokenizer() -> tuple[Path, str]:
    """The tokenizer's folder, and its name."""
    if folder := os.environ.get("TURNTRACE_BENCH_TOKENIZER"):
        return Path(folder), folder
    try:
        return npm_models("qwen2_5"), "Qwen2.5"
    except pytest.skip.Exception:
        return base_model_dir(), "SmolLM2 (Qwen2.5's could not be had)"


def _turn(template: ChatTemplate, number: int) -> Generation:
    call = json.dumps({"name": TOOL_NAME, "arguments": {"code": _CODE.format(number=number)}})
    ids = [*template.encode(f"Compute.\n<tool_call>\n{call}\n</tool_call>"), template.end_id]
    return Generation(
        ids, [float32(random.Random(f"{number}:{index}")) for index in range(len(ids))], "stop"
    )


def tasks(count: int) -> list[Task]:
    return [
        Task(str(index), [{"role": "user", "content": f"What is 6 times {next(_numbers)}?"}])
        for index in range(count)
    ]
