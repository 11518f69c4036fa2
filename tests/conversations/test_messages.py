"""Messages: what a task may give, what a sampled turn becomes, what a template sees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conversations.errors import MessageError
from conversations.formats.hermes import parse
from conversations.messages import assistant_message, given_messages, tool_message
from conversations.template.views import Dialect
from tests.helpers import call


def test_given_messages_are_kept_as_they_are() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " u\n", "name": "me"},
    ]
    assert given_messages(messages) == messages
    assert given_messages(messages) is not messages


def test_text_parts_become_one_text_and_nulls_are_missing_keys() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [
        {"role": "user", "content": parts, "name": None, "tool_calls": None},
        {"role": "assistant", "content": None},
    ]
    assert given_messages(given) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "raw": None},
    ]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
def test_given_calls_hold_their_arguments_as_text(arguments: object) -> None:
    given = [
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}],
        }
    ]
    (message,) = given_messages(given)
    assert message["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    ]
    assert message["raw"] is None


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must be a non-empty list of {role, content} objects, got an empty list"),
        ("hello", "messages must be a non-empty list"),
        (None, "got NoneType"),
        (7, "got int"),
        (["hello"], "message 0 must be an object with role and content, got str"),
        (
            [{"content": "x"}],
            "message 0 has role None; allowed are system, developer, user, assistant, tool",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "bot", "content": "x"}],
            "message 1 has role 'bot'",
        ),
        ([{"role": "user", "content": 7}], "message 0 has content of int; only text"),
        ([{"role": "user", "text": "x"}], "message 0 (user) has no content; its keys: role, text"),
        (
            [{"role": "system", "content": None}],
            "message 0 (system) has no content; its keys: role",
        ),
        ([{"role": "user", "content": b"x"}], "message 0 has content of bytes"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 0 has content of list",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            "message 0 has content of list",
        ),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            "message 0 has a tool call without function.name",
        ),
        (
            [{"role": "assistant", "tool_calls": ["f"]}],
            "message 0 has a tool call without function.name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
            "message 0 has a tool call without function.name",
        ),
        ([{"role": "assistant", "tool_calls": 5}], "message 0 has tool_calls of int"),
        (
            [{"role": "assistant", "tool_calls": {"function": {"name": "f"}}}],
            "message 0 has tool_calls of dict",
        ),
    ],
)
def test_what_is_not_in_the_schema_is_named_in_one_line(messages: object, says: str) -> None:
    with pytest.raises(MessageError) as raised:
        given_messages(messages)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_sampled_turn_keeps_its_text_and_its_malformed_calls() -> None:
    bad = "<tool_call>{oops</tool_call>"
    raw = f"Two calls.{call('f', x='é')}{bad}"
    message = assistant_message(raw, parse(raw), ["call_0_0", "call_0_1"])
    assert message == {
        "role": "assistant",
        "content": "Two calls.",
        "raw": raw,
        "tool_calls": [
            {
                "id": "call_0_0",
                "type": "function",
                "function": {"name": "f", "arguments": '{"x": "é"}'},
            },
            {
                "id": "call_0_1",
                "type": "function",
                "function": {"name": "", "arguments": bad},
                "malformed": True,
            },
        ],
    }
    assert json.loads(json.dumps(message)) == message


def test_a_turn_without_calls_has_no_tool_calls() -> None:
    assert assistant_message("42", parse("42"), []) == {
        "role": "assistant",
        "content": "42",
        "raw": "42",
    }


def test_tool_messages_name_their_call() -> None:
    assert tool_message("x", call_id="call_0_0", name="f") == {
        "role": "tool",
        "content": "x",
        "tool_call_id": "call_0_0",
        "name": "f",
    }
    assert tool_message("x", call_id=None, name="f") == {
        "role": "tool",
        "content": "x",
        "name": "f",
    }
    assert tool_message("x", call_id="call_0_0", name="") == {
        "role": "tool",
        "content": "x",
        "tool_call_id": "call_0_0",
    }


def test_templates_see_arguments_as_objects_and_no_raw() -> None:
    def message(arguments: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}],
        }

    assert Dialect().view([{**message('{"x": 1}'), "raw": "r"}]) == [message({"x": 1})]
    assert Dialect().view([message("not json")]) == [message("not json")]
