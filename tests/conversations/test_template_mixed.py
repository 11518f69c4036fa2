"""Deltas for messages of several roles after one turn, on templates of many families."""

from __future__ import annotations

import random

import pytest

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.tokens import TEMPLATE, TOOL, USER
from tests.conversations.test_template import named
from tests.helpers import odd_text

SCHEMA = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "does f",
        "parameters": {"type": "object", "properties": {}},
    },
}
ALL_MIXES = ["smollm2", "qwen2_5", "qwen3", "qwen3_thinking", "chatml_tools", "llama3", "glm",
             "harmony", "call_named", "metaspace_first"]  # fmt: skip
SHAPES = ["tu", "uu", "tat", "tatu", "uau", "ttuu", "tauau"]
"""t, u, a: a tool's, a user's, a client's own assistant message, with a call if a tool follows."""


def turn(number: int, calls: int = 1, text: str = "") -> Message:
    made = [
        {
            "id": f"call_{number}_{index}",
            "type": "function",
            "function": {"name": "f", "arguments": '{"x": 1}'},
        }
        for index in range(calls)
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def shaped(shape: str, rng: random.Random) -> tuple[Message, list[Message]]:
    """A turn, and messages of these roles after it."""
    before = turn(0, len(shape) - len(shape.lstrip("t")), "" if shape[0] == "t" else "Hm.")
    if shape == "ttuu":
        before["tool_calls"] = before["tool_calls"][:2]
    messages: list[Message] = []
    last, answered = before, 0
    for place, letter in enumerate(shape):
        if letter == "u":
            messages.append({"role": "user", "content": odd_text(rng)})
        elif letter == "a":
            last, answered = turn(place, shape[place + 1 : place + 2] == "t", odd_text(rng)), 0
            messages.append(last)
        else:
            call_id = last["tool_calls"][answered]["id"]
            content = odd_text(rng)
            messages.append(
                {"role": "tool", "tool_call_id": call_id, "content": content, "name": "f"}
            )
            answered += 1
    return before, messages


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL_MIXES)
def test_a_mixed_delta_is_what_the_whole_conversation_has(name: str, shape: str) -> None:
    template = named(name)
    if name == "llama3" and shape == "ttuu":
        pytest.skip("the template takes one call a turn")
    for seed in range(3):
        before, messages = shaped(shape, random.Random(f"{name} {shape} {seed}"))
        delta = template.follow(messages, before, with_tools=True)
        ask = {"role": "user", "content": "Well?"}
        [(_, whole)] = template.prompt([ask, before, *messages], [SCHEMA])
        assert whole[len(whole) - len(delta) :] == delta.ids()
        last = whole[len(whole) - len(delta) - 1]
        assert last in template.end_ids or template.decode([last]) == "<|end|>"


def test_each_message_has_its_author() -> None:
    template = named("qwen2_5")
    before, messages = shaped("tatu", random.Random(1))
    for place, text in enumerate(("TOOL", "OWN", "RESULT", "USER")):
        messages[place]["content"] = text
    pieces = [
        (kind, template.decode(ids)) for kind, ids in template.follow(messages, before).pieces
    ]
    assert [kind for kind, _ in pieces] == [TEMPLATE, TOOL, USER, TOOL, USER, TEMPLATE]
    for (_, text), word in zip(pieces[1:-1], ("TOOL", "OWN", "RESULT", "USER"), strict=True):
        assert word in text
    assert pieces[2][1].startswith("<|im_start|>assistant")


@pytest.mark.parametrize(
    ("name", "shape"), [("mistral", "tu"), ("gemma", "uu"), ("metaspace_plain", "tu")]
)
def test_what_is_not_proven_is_refused(name: str, shape: str) -> None:
    before, messages = shaped(shape, random.Random(0))
    with pytest.raises(TemplateError):
        named(name).follow(messages, before)


def test_messages_of_one_role_are_an_ordinary_delta() -> None:
    template = named("smollm2")
    before, messages = shaped("t", random.Random(3))
    assert template.follow(messages, before) == template.delta(messages, TOOL, turn=before)
