"""The load: conversations of 4 turns of 128 sampled tokens with a tool call after each, on one engine.

Every turn is really sampled, 128 tokens long; then a scripted turn of as many tokens takes its place, since a model
with random weights calls no tools. All contenders ask the same engine on the same event loop for the same work:

ideal      a bare loop: awaits the engine, appends ids, sleeps for as long as the tool does. What cannot be beaten.
ours       `run_tasks`, records and all; `stored` with a run folder on disk besides
trainer    ours through `generate_sequences(DataProto)`
verl       verl 0.6.1's own loop through `generate_sequences(DataProto)`, without its tokenization check and without
           log-probs, its defaults but for the check. It drops the last turn's call, so it waits for one tool less.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.batch import run_tasks
from agent.dispatch import Dispatcher
from agent.engines.engine import Engine, Generation, SamplingParams
from agent.loop import LoopSettings, Runtime
from agent.tasks import Task
from conversations.store import RunFolder
from conversations.template import ChatTemplate
from conversations.tokens import TOOL
from conversations.trajectory import Trajectory
from conversations.truncate import cut_to_tokens
from tests.bench.gpu.machine import Gpu, Usage, measured
from tools.base import BaseTool, ToolResponse
from tools.toolset import ToolSet

TURNS, TURN_TOKENS, VARIANTS = 4, 128, 64
PROMPT_LENGTH, RESPONSE_LENGTH = 1024, 1024
WORK: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": TURN_TOKENS, "ignore_eos": True}
"""The sampling params of every turn of every contender."""
TOOL_NAME = "lookup"
ANSWER = "The value is 48271.93 as of today; see section 4 for how it was measured."
TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Looks a value up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "Its name."}}, "required": ["key"]},
    },
}


class NapTool(BaseTool):
    """Answers after `nap_s` of its config."""

    config_keys = frozenset({"nap_s"})

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[ToolResponse, float, dict[str, Any]]:
        await asyncio.sleep(self.config["nap_s"])
        return ToolResponse(ANSWER), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


def scripted_turns(template: ChatTemplate) -> list[list[int]]:
    """The variants of the one turn, each of TURN_TOKENS ids with its end token."""
    turns = []
    for index in range(VARIANTS):
        call = json.dumps({"name": TOOL_NAME, "arguments": {"key": f"item {1000 + index}"}})
        block = template.encode(f"\n<tool_call>\n{call}\n</tool_call>")
        words = template.encode("The value is needed and will be looked up. " * TURN_TOKENS)
        turns.append([*words[: TURN_TOKENS - 1 - len(block)], *block, template.end_id])
    return turns


def tasks(count: int) -> list[Task]:
    return [Task(str(index), [{"role": "user", "content": f"What is item {100_000 + index} worth?"}]) for index in range(count)]


class ScriptedTurns:
    """The engine, whose sampled tokens a scripted turn replaces; log-probs, times and cache figures are the engine's."""

    def __init__(self, engine: Engine, turns: list[list[int]]) -> None:
        self._engine = engine
        self._turns = turns

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str) -> Generation:
        sampled = await self._engine.generate(prompt_ids, WORK, request_id=request_id)
        return dataclasses.replace(sampled, token_ids=self._turns[len(prompt_ids) % VARIANTS], finish_reason="stop")

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def close(self) -> None:
        """The engine is closed by whoever started it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one contender."""

    conversations: int
    usage: Usage
    trajectories: Sequence[Trajectory] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.conversations * TURNS * TURN_TOKENS / self.usage.wall_s

    @property
    def cached_share(self) -> float | None:
        """Of all prompt tokens, those that came out of the engine's prefix cache."""
        turns = [turn for one in self.trajectories for turn in one.turns]
        prompts = sum(turn.prompt_tokens or 0 for turn in turns)
        return sum(turn.cached_tokens or 0 for turn in turns) / prompts if prompts else None

    @property
    def engine_share(self) -> float | None:
        """Of the conversations' wall time, that in which they waited for the engine."""
        wall = sum(one.wall_s for one in self.trajectories)
        return sum(turn.engine_s or 0.0 for one in self.trajectories for turn in one.turns) / wall if wall else None

    @property
    def tool_share(self) -> float | None:
        """Of the conversations' wall time, that in which they waited for tools."""
        wall = sum(one.wall_s for one in self.trajectories)
        return sum(call.run_s or 0.0 for one in self.trajectories for call in one.tool_calls) / wall if wall else None


class Load:
    """The contenders over one engine. `raw` is SGLang's own `async_generate`, what the ideal loop awaits."""

    def __init__(self, engine: Engine, raw: Any, template: ChatTemplate, gpu: Gpu) -> None:
        self.turns = scripted_turns(template)
        self.scripted = ScriptedTurns(engine, self.turns)
        self._raw = raw
        self._template = template
        self._gpu = gpu

    async def ideal(self, conversations: int, nap_s: float) -> Outcome:
        prompts = [self._prompt(task) for task in tasks(conversations)]
        delta = self._delta()
        gc.collect()
        with measured(self._gpu) as usage:
            await asyncio.gather(*(self._bare(ids, delta, nap_s) for ids in prompts))
        return Outcome(conversations, usage)

    async def _bare(self, ids: list[int], delta: list[int], nap_s: float) -> None:
        for _ in range(TURNS):
            answer = await self._raw(ids, WORK)
            sampled = answer["output_ids"]
            if len(sampled) != TURN_TOKENS:
                raise RuntimeError(f"the engine sampled {len(sampled)} tokens instead of {TURN_TOKENS}")
            ids = ids + self.turns[len(ids) % VARIANTS] + delta
            await asyncio.sleep(nap_s)

    def _prompt(self, task: Task) -> list[int]:
        return [token for _, ids in self._template.prompt(task.messages, [TOOL_SCHEMA], []) for token in ids]

    def _delta(self) -> list[int]:
        delta = self._template.delta([{"role": "tool", "content": ANSWER, "tool_call_id": "call_0_0", "name": TOOL_NAME}], TOOL)
        return [token for _, ids in delta.pieces for token in ids]

    async def ours(self, conversations: int, nap_s: float, folder: Path | None = None) -> Outcome:
        """With a run folder at `folder`, made and removed here."""
        runtime = self._runtime(nap_s)
        ended: list[Trajectory] = []
        store = RunFolder.create(folder, {}) if folder else None
        gc.collect()
        with measured(self._gpu) as usage:
            progress = await run_tasks(tasks(conversations), runtime, max_concurrent=conversations, store=store, on_done=ended.append)
            if store:
                store.close({})
        if folder:
            shutil.rmtree(folder)
        if (progress.turns, progress.tool_calls, progress.tool_errors) != (TURNS * conversations, TURNS * conversations, 0):
            raise RuntimeError(f"the conversations did not make the scripted turns and calls: {progress}; {ended[:1]}")
        return Outcome(conversations, usage, ended)

    def _runtime(self, nap_s: float) -> Runtime:
        settings = LoopSettings(
            prompt_length=PROMPT_LENGTH,
            response_length=RESPONSE_LENGTH,
            max_model_len=PROMPT_LENGTH + RESPONSE_LENGTH,
            max_turns=TURNS,
            sampling={"temperature": 1.0},
        )

        def cut(text: str) -> Any:
            return cut_to_tokens(text, 256, "middle", self._template)

        tools = ToolSet.from_tools([NapTool({"nap_s": nap_s}, TOOL_SCHEMA)])
        return Runtime(self.scripted, self._template, settings, Dispatcher(tools, max_parallel_calls=16, cut=cut))
