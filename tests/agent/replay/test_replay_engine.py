"""A real engine's conversations replayed: by the record, by changed tools, by the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio

from agent.loop.batch import run_conversations, run_tasks
from agent.loop.calls import Dispatcher
from agent.loop.conversation import Conversation, Counterparts
from agent.loop.record import trajectory_of
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.tasks import Task, recorded_task
from agent.replay.compare import Scope, compare_records
from agent.replay.playback import played_back
from agent.replay.restored import replayed
from agent.replay.tools import LiveTools, RecordedTools, stand_ins
from conversations.messages import given_messages
from conversations.run.open_run import open_run
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory
from tests.conftest import ENGINE_CONTEXT, ENGINE_SLOTS
from tests.helpers import hermes_template
from tools.function import tool
from tools.toolset import ToolSet

pytestmark = pytest.mark.engine
on_session_loop = pytest.mark.asyncio(loop_scope="session")

WORDS = ("stone", "apple")


@tool
def price(word: str) -> str:
    """Looks up a price."""
    return f"{word} costs {len(word)} euros"


def dearer() -> Any:
    """The same tool, changed."""

    @tool
    def price(word: str) -> str:
        """Looks up a price."""
        return f"{word} costs {len(word) + (word == 'apple')} euros"

    return price


def messages(word: str) -> list[dict[str, Any]]:
    """Three rounds show how it is done: a small model goes on like that."""
    shown: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": f"What do bread, salt, wine, {word} and paper cost? Look them all up.",
        }
    ]
    for other in ("bread", "salt", "wine"):
        arguments = json.dumps({"word": other})
        shown += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "price", "arguments": arguments}}
                ],
            },
            {"role": "tool", "content": f"{other} costs {len(other)} euros", "name": "price"},
        ]
    return given_messages(shown)


def real(engine: Any, function: Any = price, **fields: Any) -> Runtime:
    """The engine with one tool."""
    dispatcher = Dispatcher(
        ToolSet.from_tools([function]), max_parallel_calls=4, shorten=lambda text: None
    )
    half = ENGINE_CONTEXT // 2
    limits = {"max_tokens": 32, "max_turns": 3, "sampling": {"temperature": 0.0}, **fields}
    return Runtime(
        engine, hermes_template(), LoopSettings(half, half, ENGINE_CONTEXT, **limits), dispatcher
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def records(
    sglang_rollout: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[Trajectory]:
    """What the engine sampled, as disk gives it back."""
    folder = tmp_path_factory.mktemp("recorded")
    with RunFolder.create(folder, {}) as store:
        await run_tasks(
            [Task(word, messages(word)) for word in WORDS],
            real(sglang_rollout.engine()),
            store=store,
        )
    found = list(open_run(folder))
    assert {record.num_turns for record in found} == {3}
    assert all(line.status == "ok" for record in found for line in record.tool_calls)
    return found


Make = Callable[[Trajectory, int], Conversation]


async def run_again(
    records: list[Trajectory], make: Make, n: int = 1, at_a_time: int = 1
) -> list[tuple[Trajectory, Trajectory]]:
    """Each record with the record of its replay, which `make` makes."""
    pairs = [
        (record, make(record, record.sample * n + branch))
        for record in records
        for branch in range(n)
    ]
    await run_conversations([made for _, made in pairs], max_concurrent=at_a_time)
    return [(record, trajectory_of(made)) for record, made in pairs]


def with_recorded_tools(
    record: Trajectory, sample: int, runtime: Runtime, *, live_model: bool
) -> Conversation:
    dispatcher = Dispatcher(stand_ins(record), max_parallel_calls=4, shorten=lambda text: None)
    tools = RecordedTools(record, dispatcher, live_model=live_model)
    return replayed(record, sample, runtime, Counterparts(tools, None), kept=None, parent={})


def with_live_tools(
    record: Trajectory, sample: int, runtime: Runtime, kept: int | None = None
) -> Conversation:
    assert runtime.dispatcher is not None
    task = recorded_task(record)
    tools = LiveTools(runtime.dispatcher, task, record, turns=kept, recorded_prompt=True)
    parent = {"run": "r", "id": record.id, "turn": kept}
    return replayed(record, sample, runtime, Counterparts(tools, None), kept=kept, parent=parent)


@on_session_loop
async def test_both_recorded_is_identical(records: list[Trajectory], sglang_rollout: Any) -> None:
    runtime = real(None)
    done = await run_again(
        records,
        lambda record, n: with_recorded_tools(
            record, n, played_back(runtime, record), live_model=False
        ),
    )
    scope = Scope(live_model=False, live_tools=False, decode=runtime.template.decode)
    assert [compare_records(*pair, scope) for pair in done] == [None] * len(WORDS)


@on_session_loop
async def test_a_changed_tool_is_shown_where_it_first_answered_otherwise(
    records: list[Trajectory], sglang_rollout: Any
) -> None:
    runtime = real(None, dearer())
    done = await run_again(
        records,
        lambda record, n: with_live_tools(record, n, played_back(runtime, record)),
    )
    scope = Scope(live_model=False, live_tools=True, decode=runtime.template.decode)
    for record, other in done:
        first = next((line for line in record.tool_calls if "apple" in str(line.response)), None)
        found = compare_records(record, other, scope)
        if first is None:
            assert found is None
        else:
            assert found is not None
            assert (found.kind, found.turn, found.call_id) == ("answer", first.turn, first.call_id)
            assert (found.recorded, found.replayed) == (
                {"response": "apple costs 5 euros"},
                {"response": "apple costs 6 euros"},
            )
    assert any("apple" in str(line.response) for record in records for line in record.tool_calls)


@on_session_loop
async def test_the_engine_asked_again_samples_the_same_or_the_first_other_token_is_named(
    records: list[Trajectory], sglang_rollout: Any
) -> None:
    """Greedy, one at a time. The record was made four at a time: SGLang on CPU is not
    batch-invariant.
    """
    runtime = real(sglang_rollout.engine())
    done = await run_again(
        records,
        lambda record, n: with_recorded_tools(record, n, runtime, live_model=True),
    )
    scope = Scope(live_model=True, live_tools=False, decode=runtime.template.decode)
    for record, other in done:
        found = compare_records(record, other, scope)
        old, new = record.prompt_ids + record.response_ids, other.prompt_ids + other.response_ids
        if found is None:
            assert (old, record.stop_reason) == (new, other.stop_reason)
        else:
            assert found.kind == "sampled"
            assert found.token is not None
            assert old[: found.token] == new[: found.token]
            assert (old[found.token], new[found.token]) == (
                found.recorded["ids"][0],
                found.replayed["ids"][0],
            )


@on_session_loop
async def test_forks_go_on_from_the_very_tokens_of_their_parent(
    records: list[Trajectory], sglang_rollout: Any
) -> None:
    runtime = real(sglang_rollout.engine(), sampling={"temperature": 1.5})
    forks = await run_again(
        records,
        lambda record, n: with_live_tools(record, n, runtime, kept=2),
        n=2,
        at_a_time=ENGINE_SLOTS,
    )
    assert len(forks) == 2 * len(WORDS)
    for parent, fork in forks:
        start = parent.turns[2].start
        kept = start - len(parent.prompt_ids)
        assert (fork.prompt_ids, fork.turns[:2], fork.turns[2].start) == (
            parent.prompt_ids,
            parent.turns[:2],
            start,
        )
        assert fork.response_ids[:kept] == parent.response_ids[:kept]
        assert fork.response_logprobs[:kept] == parent.response_logprobs[:kept]
        assert fork.tool_calls[:2] == parent.tool_calls[:2]
        assert fork.turns[2].prompt_tokens == start  # what the engine itself counted
        assert (fork.parent or {})["turn"] == 2
    assert len({tuple(fork.response_ids) for _, fork in forks}) > len(
        WORDS
    )  # fresh, not played back
