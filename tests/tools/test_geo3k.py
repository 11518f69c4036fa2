"""Rules: graded as in verl 0.6.1; any answer takes bounded time, runs nothing, blocks nothing."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.helpers import until
from tools.base import BackendError
from tools.geo3k import Geo3kTool, WorkerEndedError
from tools.servers.grader import grade_expression

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calc_geo3k_reward",
        "description": "Submits the answer.",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
        },
    },
}
PIECES = (
    "1", "2", "7", "12", "0.5", ".5", "1,000", "\\frac{1}{2}", "\\frac12", "1/2", "\\sqrt{2}",
    "2\\sqrt{3}", "\\pi", "x", "y", "+", "-", "*", "^2", "(", ")", "[", ",", " ", "\\text{ cm}",
    "cm", "^\\circ", "degrees", "°", "%", "\\%", "$", "\\boxed{7}", "=",
    "\\left(", "\\right)",
    "\\dfrac{3}{4}", "{", "}", " or ", "million", "A", "∠", "√3", "_1", "!",
)  # fmt: skip


def answers(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choices(PIECES, k=rng.choice((0, 1, 1, 1, 2, 2, 3, 4)))) for _ in range(count)
    ]


@pytest_asyncio.fixture
async def geo3k() -> AsyncIterator[Geo3kTool]:
    tool = Geo3kTool({}, SCHEMA)
    yield tool
    await tool.close()


def graders() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "tools.servers.grader" in child.cmdline()
    ]


def test_grading_agrees_with_verl() -> None:
    verl = pytest.importorskip("verl.utils.reward_score.geo3k")
    right = 0
    for answer, truth in zip(answers(400, seed=1), answers(400, seed=2), strict=True):
        for given in (answer, truth, f" {truth} "):
            expected = verl.compute_score(given, truth, use_boxed=False, format_score=0.0)
            assert float(grade_expression(given, truth)) == expected, (given, truth)
            right += expected == 1.0
    assert 400 < right < 1200


async def test_a_conversation_reads_and_pays_as_with_verls_own_tool(geo3k: Geo3kTool) -> None:
    verl_tools = pytest.importorskip("verl.tools.geo3k_tool")
    from verl.tools.schemas import OpenAIFunctionToolSchema

    theirs = verl_tools.Geo3kTool({}, OpenAIFunctionToolSchema.model_validate(SCHEMA))
    submitted = answers(60, seed=3)
    for index, start in enumerate(range(0, 60, 6)):
        instance, _ = await theirs.create(f"t{index}", ground_truth="\\frac{1}{2}")
        await geo3k.create(instance, ground_truth="\\frac{1}{2}")
        assert await geo3k.calc_reward(instance) == await theirs.calc_reward(instance)
        for answer in [*submitted[start : start + 6], 0.5, "1/2", "0.5", "2"]:
            mine = await geo3k.execute(instance, {"answer": answer})
            verls = await theirs.execute(instance, {"answer": answer})
            assert (mine[0].text, mine[1], mine[2]) == (verls[0].text, verls[1], verls[2])
            assert await geo3k.calc_reward(instance) == await theirs.calc_reward(instance)


@pytest.mark.parametrize(
    "hostile",
    [
        "9**9**9**9",
        "9!!!!!!!!!!!!!!",
        "(" * 100_000,
        "1,000" * 200_000,
        "\\frac{" * 50_000,
    ],
    ids=lambda text: text[:12],
)
async def test_what_takes_forever_is_worth_nothing_and_holds_up_nobody(
    geo3k: Geo3kTool, hostile: str
) -> None:
    for instance in ("a", "b"):
        await geo3k.create(instance, ground_truth="x")
    await geo3k.start()
    asked = asyncio.create_task(geo3k.execute("a", {"answer": hostile}))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 0
    assert (await asked)[1] == -0.05
    assert await geo3k.calc_reward("a") == 0.0
    assert (await geo3k.execute("b", {"answer": "x"}))[1] == 0.0
    assert await geo3k.calc_reward("b") == 1.0


async def test_an_answer_that_takes_too_long_says_so_in_its_metrics(geo3k: Geo3kTool) -> None:
    await geo3k.create("a", ground_truth="x")
    assert (await geo3k.execute("a", {"answer": "9**9**9**9"}))[2] == {
        "grading": "it took too long"
    }


def test_what_python_would_run_is_not_evaluated(tmp_path: Path) -> None:
    """Code gets past mathruler's check by uncounted letters, attributes and escapes in strings."""
    target = tmp_path / "reached"
    attacks = [
        f"__import__('os').system('touch {target}')",
        f"open('{target}', 'w')",
        "().__ⅽⅼass__",
        "(1).ⅾⅰaa",
        "ii.#\nⅽⅼaa",
        '"\\157\\160"',
        "1 .ⅽⅼ()",
    ]
    for attack in attacks:
        assert not grade_expression(attack, "2")
        assert not grade_expression(f"(2)-0*({attack})", "2")
        assert grade_expression(attack, attack)
    assert not target.exists()


async def test_a_cancelled_answer_leaves_no_process_busy(geo3k: Geo3kTool) -> None:
    await geo3k.start()
    await geo3k.create("a", ground_truth="x")
    (worker,) = graders()
    asked = asyncio.create_task(geo3k.execute("a", {"answer": "9**9**9**9"}))
    await until(lambda: not geo3k._idle)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not worker.is_running()
    assert (await geo3k.execute("a", {"answer": "x"}))[1] == 0.0


async def test_a_grader_that_somebody_ends_is_started_again(geo3k: Geo3kTool) -> None:
    await geo3k.start()
    await geo3k.create("a", ground_truth="2")
    for grader in graders():
        grader.kill()
        grader.wait()
    assert (await geo3k.execute("a", {"answer": "2"}))[1:] == (0.0, {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_grader_that_is_always_killed_from_outside_gives_no_reward(
    geo3k: Geo3kTool, number: signal.Signals
) -> None:
    """What the answer is worth is not known: the backend failed, and that is no reward of 0."""
    await geo3k.start()
    await geo3k.create("a", ground_truth="x")
    asked = asyncio.create_task(geo3k.execute("a", {"answer": "9**9**9**9"}))
    await until(lambda: not geo3k._idle)
    while not asked.done():
        for grader in graders():
            grader.send_signal(number)
        await asyncio.sleep(0.01)
    with pytest.raises(BackendError, match="the grader ended"):
        await asked
    assert graders() == []


@pytest.mark.parametrize(
    ("code", "by_the_answer"),
    [
        (-signal.SIGPROF, True),
        (-signal.SIGSEGV, True),
        (-signal.SIGABRT, True),
        (1, True),
        (-signal.SIGKILL, False),
        (-signal.SIGTERM, False),
        (-signal.SIGINT, False),
        (255, False),
        (0, False),
        (None, False),
    ],
)
def test_how_a_grader_ended_says_whose_fault_it_was(code: int | None, by_the_answer: bool) -> None:
    assert WorkerEndedError(code).by_the_answer is by_the_answer


async def test_closing_leaves_nothing(geo3k: Geo3kTool) -> None:
    await geo3k.start()
    for instance in ("a", "b", "c"):
        await geo3k.create(instance, ground_truth="2")
    await asyncio.gather(
        *(geo3k.execute(instance, {"answer": "2"}) for instance in ("a", "b", "c"))
    )
    assert graders() != []
    await geo3k.close()
    assert graders() == []
    await geo3k.close()


async def test_without_a_ground_truth_there_is_no_reward_and_no_process(geo3k: Geo3kTool) -> None:
    instance, _ = await geo3k.create()
    response, step, _ = await geo3k.execute(instance, {"answer": "8"})
    assert (response.text, step, await geo3k.calc_reward(instance)) == (
        "Current parsed answer='8'",
        None,
        None,
    )
    await geo3k.release(instance)
    assert graders() == []
