"""The load: conversations of 4 turns of 128 sampled tokens with a tool call after each.

Every turn is really sampled, 128 tokens long; then a scripted turn of as many tokens takes its
place, since a model with random weights calls no tools. All contenders ask the same engine on the
same event loop for the same work:

With `apart` conversations end at different times in life, after 2 to 6 turns, and three times as
many follow each other: records are written while the engine works, as in most runs.

ideal      a bare loop: awaits the engine, appends ids, sleeps for as long as the tool does. It
           cannot be beaten.
ours       `run_tasks`, records and all; `stored` with a run folder on disk besides
trainer    ours through `generate_sequences(DataProto)`
verl       verl 0.6.1's own loop through `generate_sequences(DataProto)`, without its tokenization
           check and without log-probs, its defaults but for the check. It drops the last turn's
           call, so it waits for one tool less.
client     of a server: the bare loop through our HTTP client; its `ideal` speaks HTTP/1.1 itself
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import shutil
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.engines.engine import Engine, Generation, SamplingParams
from agent.loop.batch import Progress, run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.tokens import TOOL
from conversations.trajectory import Trajectory
from conversations.truncate import cut_to_tokens
from tests.bench.gpu.machine import Gpu, Requests, Usage, measured
from tools.base import BaseTool, ToolResponse
from tools.toolset import ToolSet

TURNS, VARIANTS = 4, 64
PROMPT_LENGTH, RESPONSE_LENGTH = 1024, 1024
CONVERSATION_TOKENS = 1024
"""More than a conversation has at its end."""
TOOL_NAME = "lookup"
ANSWER = "The value is 48271.93 as of today; see section 4 for how it was measured."
TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Looks a value up.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "Its name."}},
            "required": ["key"],
        },
    },
}

Raw = Callable[[list[int], dict[str, Any]], Awaitable[Any]]
"""What a bare loop awaits: prompt ids and sampling params to an object with `output_ids`, as SGLang
answers.
"""


class NapTool(BaseTool):
    """Answers after `nap_s` of its config."""

    config_keys = frozenset({"nap_s"})

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        await asyncio.sleep(self.config["nap_s"])
        return ToolResponse(ANSWER), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


def scripted_turns(template: ChatTemplate, tokens: int) -> list[list[int]]:
    """The variants of the one turn, each of `tokens` ids with its end token; the last 48 at most
    are the call.
    """
    turns = []
    for index in range(VARIANTS):
        call = json.dumps({"name": TOOL_NAME, "arguments": {"key": f"item {1000 + index}"}})
        block = template.encode(f"\n<tool_call>\n{call}\n</tool_call>")
        words = template.encode("The value is needed and will be looked up. " * tokens)
        turns.append([*words[: tokens - 1 - len(block)], *block, template.end_id])
    return turns


def turns_each(conversations: int, apart: bool) -> list[int]:
    """How many turns each conversation makes, of so many at once."""
    return (
        [2 + index % 5 for index in range(3 * conversations)] if apart else [TURNS] * conversations
    )


def tasks(count: int) -> list[Task]:
    return [
        Task(str(index), [{"role": "user", "content": f"What is item {100_000 + index} worth?"}])
        for index in range(count)
    ]


class ScriptedTurns:
    """The load's engine, whose sampled tokens but the first `kept` a scripted turn replaces; all
    else is the engine's.
    """

    def __init__(self, load: Load, work: Mapping[str, Any], kept: int) -> None:
        self._load, self._engine, self._work, self._kept = load, load.engine, work, kept

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        with self._load.requests.one():
            sampled = await self._engine.generate(prompt_ids, self._work, request_id=request_id)
        ids = (
            sampled.token_ids[: self._kept]
            + self._load.turns[len(prompt_ids) % VARIANTS][self._kept :]
        )
        return dataclasses.replace(sampled, token_ids=ids, finish_reason="stop")

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def close(self) -> None:
        """The engine is closed by whoever started it."""


class EndingTurns(ScriptedTurns):
    """As `ScriptedTurns`; the last of each conversation's turns makes no call."""

    def __init__(self, load: Load, turns: Sequence[int]) -> None:
        super().__init__(load, load.work, 0)
        self._turns = iter(turns)
        self._left: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        conversation = asyncio.current_task()
        if conversation not in self._left:
            self._left[conversation] = next(self._turns)
        self._left[conversation] -= 1
        is_last = self._left[conversation] == 0
        generation = await super().generate(prompt_ids, sampling, request_id=request_id)
        return dataclasses.replace(generation, token_ids=self._load.last) if is_last else generation


class _TimedStore:
    """A run folder, and the seconds that writing to it took."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder.create(folder, {})
        self.done = self.folder.done
        self.append_unfinished = self.folder.append_unfinished
        self.keep_evidence = self.folder.keep_evidence
        self.took_s = 0.0

    def append(self, trajectory: Trajectory) -> None:
        started = perf_counter()
        self.folder.append(trajectory)
        self.took_s += perf_counter() - started

    def close(self) -> None:
        started = perf_counter()
        self.folder.close({})
        self.took_s += perf_counter() - started


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one contender."""

    turns: int
    tokens: int
    usage: Usage
    trajectories: Sequence[Trajectory] = ()

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON values.

        Shares are of the conversations' wall time but for `cached_share`, of prompt tokens.
        """
        turns = [turn for one in self.trajectories for turn in one.turns]
        wall_s = sum(one.wall_s for one in self.trajectories)
        tools_s = sum(call.run_s or 0.0 for one in self.trajectories for call in one.tool_calls)
        found = {
            **dataclasses.asdict(self.usage),
            "loop_ms_per_turn": 1e3 * self.usage.loop_cpu_s / self.turns,
            "cached_share": _share(
                sum(turn.cached_tokens or 0 for turn in turns),
                sum(turn.prompt_tokens or 0 for turn in turns),
            ),
            "engine_share": _share(sum(turn.engine_s or 0.0 for turn in turns), wall_s),
            "tool_share": _share(tools_s, wall_s),
        }
        speed = round(self.tokens / self.usage.wall_s)
        return {
            "tokens_per_s": speed,
            **{name: None if value is None else round(value, 3) for name, value in found.items()},
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class Load:
    """The contenders over one engine, whose event loop is `loop`. `raw` is what the ideal loop
    awaits.

    `work` are the sampling params of every turn of every contender, `turn_tokens` its length.
    """

    def __init__(
        self,
        engine: Engine,
        raw: Raw,
        template: ChatTemplate,
        gpu: Gpu,
        loop: asyncio.AbstractEventLoop,
        turn_tokens: int = 128,
    ) -> None:
        self.turns = scripted_turns(template, turn_tokens)
        words = template.encode("It is worth 48271.93, as was found. " * turn_tokens)
        self.last = [*words[: turn_tokens - 1], template.end_id]
        self.turn_tokens = turn_tokens
        self.work: dict[str, Any] = {
            "temperature": 1.0,
            "max_new_tokens": turn_tokens,
            "ignore_eos": True,
        }
        self.requests = Requests()
        self.engine, self.gpu, self.loop = engine, gpu, loop
        self._raw, self._template = raw, template

    def ideal(self, conversations: int, nap_s: float, *, apart: bool = False) -> Outcome:
        return self.bare(self._raw, conversations, nap_s, apart=apart)

    def bare(self, raw: Raw, conversations: int, nap_s: float, *, apart: bool = False) -> Outcome:
        """The bare loop over `raw`; prompts and what follows a turn are made before the clock
        starts.
        """
        each = turns_each(conversations, apart)
        prompts = [self._prompt(task) for task in tasks(len(each))]
        delta = self._delta()

        async def all_of_them() -> None:
            slots = asyncio.Semaphore(conversations)

            async def one(ids: list[int], turns: int) -> None:
                async with slots:
                    await self._bare(raw, ids, delta, nap_s, turns)

            await asyncio.gather(*map(one, prompts, each))

        gc.collect()
        with measured(self.gpu, self.requests, self.loop) as usage:
            self.loop.run_until_complete(all_of_them())
        return self.outcome(sum(each), usage)

    async def _bare(
        self, raw: Raw, ids: list[int], delta: list[int], nap_s: float, turns: int
    ) -> None:
        for _ in range(turns):
            with self.requests.one():
                answer = await raw(ids, self.work)
            if len(answer["output_ids"]) != self.turn_tokens:
                raise RuntimeError(
                    f"the engine sampled {len(answer['output_ids'])} tokens instead of "
                    f"{self.turn_tokens}"
                )
            ids = ids + self.turns[len(ids) % VARIANTS] + delta
            await asyncio.sleep(nap_s)

    def _prompt(self, task: Task) -> list[int]:
        return [
            token
            for _, ids in self._template.prompt(task.messages, [TOOL_SCHEMA], [])
            for token in ids
        ]

    def _delta(self) -> list[int]:
        delta = self._template.delta(
            [{"role": "tool", "content": ANSWER, "tool_call_id": "call_0_0", "name": TOOL_NAME}],
            TOOL,
        )
        return [token for _, ids in delta.pieces for token in ids]

    def ours(
        self,
        conversations: int,
        nap_s: float,
        folder: Path | None = None,
        *,
        apart: bool = False,
    ) -> Outcome:
        """With a run folder at `folder`, made and removed here."""
        store = _TimedStore(folder) if folder else None
        ended: list[Trajectory] = []
        each = turns_each(conversations, apart)
        engine = EndingTurns(self, each) if apart else self.scripted()
        runtime = self.runtime(engine, nap_s, max(each))
        gc.collect()
        with measured(self.gpu, self.requests, self.loop) as usage:
            running = run_tasks(
                tasks(len(each)),
                runtime,
                max_concurrent=conversations,
                store=store,
                on_done=ended.append,
            )
            progress = self.loop.run_until_complete(running)
            if store:
                store.close()
        if store:
            usage.writing_s = store.took_s
            shutil.rmtree(store.folder.path)
        calls = sum(each) - len(each) if apart else sum(each)
        made = progress.turns, progress.tool_calls, progress.tool_errors
        if made != (sum(each), calls, 0):
            raise RuntimeError(
                f"the conversations did not make the scripted turns and calls: {progress}; "
                f"{ended[:1]}"
            )
        return self.outcome(sum(each), usage, ended)

    async def interrupted(
        self,
        conversations: int,
        interrupt: Callable[[], Awaitable[Any]],
        runtime: Runtime | None = None,
    ) -> Interruption:
        """A run of ours, and what `interrupt` does once the conversations have, on average, made a
        turn and a half.
        """
        progress, ended = Progress(), dict[str, Trajectory]()
        shared = runtime or self.runtime(self.scripted(), 0.05)
        given = tasks(conversations)
        batch = asyncio.create_task(
            run_tasks(
                given,
                shared,
                max_concurrent=conversations,
                progress=progress,
                on_done=lambda one: ended.update({one.task_id: one}),
            )
        )
        while progress.turns_so_far < 3 * conversations // 2 and not batch.done():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)
        before, started = progress.turns_so_far, perf_counter()
        await interrupt()
        took_s, after = perf_counter() - started, progress.turns_so_far
        await batch
        figures: dict[str, Any] = {
            "conversations": conversations,
            "turns_before": before,
            "turns_meanwhile": after - before,
        }
        figures |= {
            "took_s": round(took_s, 2),
            "turns": progress.turns,
            "ended": dict(progress.stop_reasons),
            "infra_errors": progress.infra_errors,
        }
        return Interruption(figures, ended)

    def scripted(self, kept: int = 0, **work: Any) -> ScriptedTurns:
        """The engine as ours asks it; `work` changes the sampling params."""
        return ScriptedTurns(self, {**self.work, **work}, kept)

    def outcome(self, turns: int, usage: Usage, trajectories: Sequence[Trajectory] = ()) -> Outcome:
        return Outcome(turns, turns * self.turn_tokens, usage, trajectories)

    def runtime(self, engine: Engine, nap_s: float, max_turns: int = TURNS) -> Runtime:
        settings = LoopSettings(
            prompt_length=PROMPT_LENGTH,
            response_length=RESPONSE_LENGTH,
            max_model_len=PROMPT_LENGTH + RESPONSE_LENGTH,
            max_turns=max_turns,
            sampling={"temperature": 1.0},
        )

        def cut(text: str) -> Any:
            return cut_to_tokens(text, 256, "middle", self._template)

        tools = ToolSet.from_tools([NapTool({"nap_s": nap_s}, TOOL_SCHEMA)])
        return Runtime(
            engine, self._template, settings, Dispatcher(tools, max_parallel_calls=16, shorten=cut)
        )


@dataclass(frozen=True, slots=True)
class Interruption:
    """What became of a run that something happened to; `ended` by task id."""

    figures: dict[str, Any]
    ended: dict[str, Trajectory]


def in_turn(raws: Sequence[Raw]) -> Raw:
    """Conversations over several engines: each stays with one, as prefix caches want it, and all
    have as many.
    """
    turns, chosen = itertools.cycle(raws), weakref.WeakKeyDictionary[Any, Raw]()

    async def ask(ids: list[int], sampling: dict[str, Any]) -> Any:
        conversation = asyncio.current_task()
        if conversation not in chosen:
            chosen[conversation] = next(turns)
        return await chosen[conversation](ids, sampling)

    return ask
