"""Rules: answers are read, graded and answered as in verl 0.6.1; state is per trajectory."""

from __future__ import annotations

import random

import pytest

from tools.base import ToolConfigError
from tools.gsm8k import Gsm8kTool, extract_answer, grade

SCHEMA = {
    "type": "function",
    "function": {
        "name": "calculate_answer",
        "description": "Submit the answer.",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
        },
    },
}


def answers(count: int, seed: int) -> list[str]:
    """Strings that look like, and unlike, what a model submits."""
    rng = random.Random(seed)
    pieces = [
        "####",
        "#### ",
        "-",
        "7",
        "42",
        "1,000",
        "3.50",
        ".",
        ",",
        "..",
        "$",
        " ",
        "\n",
        "£",
        "٣",
        "answer is ",
        "x" * 290,
        "−5",
        "1e3",
        "$1,2.3",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(count)]


def test_extraction_and_grading_agree_with_verl() -> None:
    verl = pytest.importorskip("verl.utils.reward_score.gsm8k")
    for text in answers(2000, seed=1):
        for method in ("strict", "flexible"):
            assert extract_answer(text, method) == verl.extract_solution(text, method), (
                text,
                method,
            )
            for truth in ("42", "7", "1,000", "."):
                assert repr(grade(text, truth, method)) == repr(
                    verl.compute_score(text, truth, method)
                ), (text, truth, method)


async def test_a_conversation_reads_and_pays_as_with_verls_own_tool() -> None:
    verl_tools = pytest.importorskip("verl.tools.gsm8k_tool")
    from verl.tools.schemas import OpenAIFunctionToolSchema

    theirs = verl_tools.Gsm8kTool({}, OpenAIFunctionToolSchema.model_validate(SCHEMA))
    ours = Gsm8kTool({}, SCHEMA)
    submitted = answers(600, seed=2)
    for index, start in enumerate(range(0, 600, 6)):
        instance, _ = await theirs.create(f"t{index}", ground_truth="42")
        await ours.create(instance, ground_truth="42")
        for answer in [*submitted[start : start + 6], 42, 42.0, "42"]:
            mine = await ours.execute(instance, {"answer": answer})
            verls = await theirs.execute(instance, {"answer": answer})
            assert (mine[0].text, mine[1], mine[2]) == (verls[0].text, verls[1], verls[2])
            assert await ours.calc_reward(instance) == await theirs.calc_reward(instance)


async def test_the_ground_truth_comes_plain_or_nested() -> None:
    tool = Gsm8kTool({}, SCHEMA)
    for kwargs in (
        {"ground_truth": "8"},
        {"create_kwargs": {"ground_truth": "8"}},
        {"ground_truth": 8},
    ):
        instance, response = await tool.create(**kwargs)
        assert response.text is None
        response, step, metrics = await tool.execute(instance, {"answer": "8"})
        assert (response.text, step, metrics) == ("Current parsed answer='8' reward=1.0", 0.0, {})
        assert (await tool.execute(instance, {"answer": "8"}))[1] == -0.05
        assert await tool.calc_reward(instance) == 1.0


async def test_without_a_ground_truth_there_is_no_reward() -> None:
    tool = Gsm8kTool({}, SCHEMA)
    instance, _ = await tool.create()
    response, step, _ = await tool.execute(instance, {"answer": "8"})
    assert (response.text, step, await tool.calc_reward(instance)) == (
        "Current parsed answer='8'",
        None,
        None,
    )


async def test_strict_reads_only_a_marked_answer() -> None:
    tool = Gsm8kTool({"method": "strict"}, SCHEMA)
    instance, _ = await tool.create(ground_truth="8")
    await tool.execute(instance, {"answer": "it is 8"})
    assert await tool.calc_reward(instance) == 0.0
    await tool.execute(instance, {"answer": "8"})
    assert await tool.calc_reward(instance) == 1.0


async def test_trajectories_do_not_see_each_other_and_release_forgets() -> None:
    tool = Gsm8kTool({}, SCHEMA)
    right, _ = await tool.create("a", ground_truth="1")
    wrong, _ = await tool.create("b", ground_truth="2")
    for instance in (right, wrong):
        await tool.execute(instance, {"answer": "1"})
    assert (await tool.calc_reward(right), await tool.calc_reward(wrong)) == (1.0, 0.0)
    await tool.release(right)
    with pytest.raises(LookupError, match=r"calculate_answer .*'a'"):
        await tool.execute(right, {"answer": "1"})
    assert await tool.calc_reward(wrong) == 0.0


def test_the_name_is_the_schemas() -> None:
    schema = {"type": "function", "function": {**SCHEMA["function"], "name": "calc_gsm8k_reward"}}  # type: ignore[dict-item]
    assert Gsm8kTool({}, schema).name == "calc_gsm8k_reward"


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ToolConfigError, match=r"config\.method .*'loose'"):
        Gsm8kTool({"method": "loose"}, SCHEMA)
