"""A training conversation is, id for id, what the runtime would feed the engine, with the loss on
the model's turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from agent.errors import ConfigError, TaskError
from agent.model.base import base_model_dir
from agent.recipe.data import (
    SMALL,
    ExampleRenderer,
    Mix,
    build_examples,
    held_out,
    read_gsm8k,
    template_of,
)
from agent.recipe.programs import Problem, Step
from agent.recipe.setups import draw, shipped_setup, shipped_tools
from conversations.formats.hermes import parse
from conversations.messages import ToolCall
from conversations.template import ChatTemplate

TOOLS = Path(__file__).parents[3] / "tool_configs" / "gsm8k.yaml"
PROBLEM = Problem(
    "Ann has 3 bags of 5 nuts. How many nuts?", (Step("nuts", "3 * 5"),), "15", "gsm8k"
)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    try:
        return template_of(base_model_dir())
    except ConfigError as error:
        pytest.skip(str(error))


def render(template: ChatTemplate, mix: Mix, seed: int) -> tuple[str, list[str]]:
    """The whole text of an example, and the texts of the turns with loss."""
    example = ExampleRenderer(template, shipped_tools(TOOLS)).example(
        PROBLEM, Random(seed), mix=mix
    )
    assert example is not None
    turns: list[list[int]] = []
    for at, (token, flag) in enumerate(zip(example.ids, example.loss, strict=True)):
        if flag and not example.loss[at - 1]:
            turns.append([])
        if flag:
            turns[-1].append(token)
    assert all(turn[-1] == template.end_id for turn in turns), (
        "the end of a turn is the model's to say"
    )
    return template.decode(example.ids), [template.raw(turn) for turn in turns]


@pytest.mark.parametrize("seed", range(8))
def test_the_protocol_is_code_then_answer_then_a_sentence(
    template: ChatTemplate, seed: int
) -> None:
    _, turns = render(template, Mix(1, 0, 0, fault_share=0.0), seed)
    calls = [parse(turn).calls for turn in turns]
    assert [len(of_turn) for of_turn in calls] == [1, 1, 0]
    code, answer = (of_turn[0] for of_turn in calls[:2])
    assert isinstance(code, ToolCall)
    assert isinstance(answer, ToolCall)
    assert list(code.arguments.values()) == ["nuts = 3 * 5\nprint(nuts)"]
    assert list(answer.arguments.values()) == ["15"]


@pytest.mark.parametrize("seed", range(8))
def test_a_faulty_first_call_is_seen_and_never_learned(template: ChatTemplate, seed: int) -> None:
    text, turns = render(template, Mix(1, 0, 0, fault_share=1.0, shipped_share=1.0), seed)
    assert text.count("<|im_start|>assistant") > len(turns) == 3
    assert all("Error" not in turn for turn in turns)
    assert parse(turns[0]).calls[0].raw == turns[0]


def test_the_ids_are_the_templates_own(template: ChatTemplate) -> None:
    text, turns = render(template, Mix(1, 0, 0, fault_share=0.0, shipped_share=1.0), 2)
    calls = [parse(turn).calls[0] for turn in turns[:2]]
    tools = shipped_tools(TOOLS)
    if text.index("calculate_answer") < text.index("code_interpreter"):
        tools.reverse()
    question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    responses = [
        part.split("\n</tool_response>")[0] for part in text.split("<tool_response>\n")[1:]
    ]
    messages: list[dict[str, object]] = [{"role": "user", "content": question}]
    for call, response in zip(calls, responses, strict=True):
        assert isinstance(call, ToolCall)
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": call.name, "arguments": call.arguments}}],
            }
        )
        messages.append({"role": "tool", "content": response})
    messages.append({"role": "assistant", "content": turns[2]})
    whole = template.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert text == whole.removesuffix("\n")


def test_shipped_tools_are_offered_as_written_in_either_order() -> None:
    tools = shipped_tools(TOOLS)
    assert list(shipped_setup(tools, reverse=True).tools) == tools[::-1]
    assert list(shipped_setup(tools, reverse=False).tools) == tools


def test_other_set_ups_name_what_their_schemas_name() -> None:
    tools = shipped_tools(TOOLS)
    for seed in range(50):
        setup = draw(tools, Random(seed), shipped_share=0.0)
        schemas = {
            tool["function"]["name"]: tool["function"]["parameters"]["properties"]
            for tool in setup.tools
        }
        assert setup.code_argument in schemas[setup.code_name]
        assert setup.answer_argument in schemas[setup.answer_name]


def test_held_out_rows_are_never_trained_on_and_the_same_seed_gives_the_same_ids(
    template: ChatTemplate,
) -> None:
    rows = [
        {
            "question": f"Ann has {n} bags of 5 nuts. How many?",
            "answer": f"<<{n}*5={n * 5}>>{n * 5} nuts\n#### {n * 5}",
        }
        for n in range(2, 200)
    ]
    kept_back = {row["question"] for row in rows if held_out(row["question"])}
    assert 0 < len(kept_back) < 20
    renderer, mix = ExampleRenderer(template, shipped_tools(TOOLS)), Mix(1, 0, 1)
    first = list(build_examples(rows, renderer, mix))
    assert [example.ids for example in build_examples(rows, renderer, mix)] == [
        example.ids for example in first
    ]
    trained = [template.decode(example.ids) for example in first if not example.held_out]
    assert len(trained) >= 150
    assert not any(question in text for text in trained for question in kept_back)


def test_a_row_that_is_not_gsm8k_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"prompt": "q"}\n')
    with pytest.raises(TaskError, match=r"x\.jsonl:2 "):
        read_gsm8k(tmp_path / "x.jsonl")
    with pytest.raises(TaskError, match=r"none\.jsonl"):
        read_gsm8k(tmp_path / "none.jsonl")


def test_the_small_mix_is_small() -> None:
    assert SMALL.generated + (SMALL.gsm8k_rows or 0) <= 1500


def test_a_rows_text_may_hold_any_character_and_lines_may_be_blank(tmp_path: Path) -> None:
    row = {"question": "How\u2028many\x85?", "answer": "#### 2"}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{line}\r\n\n{line}\n\n", encoding="utf-8", newline="")
    assert read_gsm8k(tmp_path / "x.jsonl") == [row, row]
