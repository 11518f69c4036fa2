"""A body that is read as the last one with more messages gives the request that it gives alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from agent.gateway.anthropic import ANTHROPIC
from agent.gateway.chat import CHAT
from agent.gateway.dialect import ApiDialect
from agent.gateway.growing import BodyReader
from agent.gateway.request import Refusal, TurnRequest

CALL = {"id": "c", "function": {"name": "look", "arguments": '{"a": "],\\"tools\\":[]"}'}}
USE = {"type": "tool_use", "id": "c", "name": "look", "input": {"a": 'x],"model":"y'}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "]}"}
HEAD = {"stream": True, "metadata": {"messages": [{"role": "user", "content": "no"}]}}
TAIL = {"max_tokens": 9, "model": "m", "temperature": 0.5}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}, "name": "look"}

TURNS: dict[ApiDialect, list[list[dict[str, Any]]]] = {
    CHAT: [
        [{"role": "system", "content": ""}, {"role": "user", "content": 'é "messages": [1]'}],
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "tool", "tool_call_id": "c", "content": "[2]"}],
        [{"role": "system", "content": ""}, {"role": "developer", "content": "now"}],
        [{"role": "user", "content": [{"type": "text", "text": "\\"}]}],
    ],
    ANTHROPIC: [
        [{"role": "user", "content": "see [1]"}],
        [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}],
        [{"role": "system", "content": ""}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    ],
}
DIALECTS = sorted(TURNS, key=lambda dialect: dialect.name)


def names(dialect: ApiDialect) -> str:
    return dialect.name


def outcome(read: Any) -> TurnRequest | tuple[int, str]:
    try:
        return read()
    except Refusal as refusal:
        return refusal.status, refusal.message


@pytest.mark.parametrize("dialect", DIALECTS, ids=names)
@pytest.mark.parametrize("more", [{}, HEAD], ids=["first", "later"])
@pytest.mark.parametrize("option", [0, orjson.OPT_INDENT_2], ids=["compact", "spaced"])
def test_a_history_that_grows(dialect: ApiDialect, more: dict[str, Any], option: int) -> None:
    reader = BodyReader()
    messages: list[dict[str, Any]] = []
    whole: list[bytes] = []

    def read(raw: bytes) -> TurnRequest:
        whole.append(raw)
        return dialect.read(raw)

    counted = replace(dialect, read=read)
    for added in TURNS[dialect]:
        messages = [*messages, *added]
        body = {**more, "messages": messages, "tools": [TOOL], **TAIL}
        raw = orjson.dumps(body, option=option)
        assert reader.read(counted, raw) == dialect.read(raw)
    # A key of the same name before the list is not the list: then each body is read whole.
    assert len(whole) == (len(TURNS[dialect]) if more else 1)


FIRST = rb'{"messages":[{"role":"user","content":"see [1"}],"model":"m"}'
MORE = b'{"role":"user","content":"x"}'


@pytest.mark.parametrize("dialect", DIALECTS, ids=names)
@pytest.mark.parametrize(
    "second",
    [
        FIRST,
        FIRST.replace(b'"}]', b'"},' + MORE + b"]"),
        FIRST.replace(b'"}]', b'"},]'),
        FIRST.replace(b'"}]', b'"},,' + MORE + b"]"),
        FIRST.replace(b'"}]', b'"} ' + MORE + b"]"),
        FIRST.replace(b'"}]', b'"},' + MORE + b",]"),
        FIRST.replace(b'"}]', b'"},"x"]'),
        FIRST.replace(b'"}]', b'"},{"role":"user"}]'),
        FIRST.replace(b'"}]', b'"},{"role":"nobody","content":"x"}]'),
        FIRST.replace(b'"}]', b'"},{"role":"user","content":"\\ud83d"}]'),
        FIRST.replace(b'"}]', b'"}],"messages":[' + MORE + b"]"),
        FIRST.replace(b'"}]', b'"},' + MORE + b'],"messages":[' + MORE + b"]"),
        FIRST.replace(b'"}]', b'"},' + MORE + b'],"tools":[{}]'),
        FIRST.replace(b"see [1", b"see [1,2"),
        FIRST.replace(b'"m"', b'"n"'),
        FIRST.replace(b"}],", b'}],"messages":[],'),
        FIRST[:-1] + b',"max_tokens":3}',
        FIRST.replace(b'"}]', b'"},' + MORE * 2 + b"]"),
        b"[" + FIRST + b"]",
    ],
)
def test_a_body_that_only_looks_like_the_last_one_with_more(
    dialect: ApiDialect, second: bytes
) -> None:
    reader = BodyReader()
    assert reader.read(dialect, FIRST) == dialect.read(FIRST)
    for raw in (second, FIRST, second):
        whole = outcome(lambda raw=raw: dialect.read(raw))
        assert outcome(lambda raw=raw: reader.read(dialect, raw)) == whole


def test_two_lists_of_one_name_are_never_one() -> None:
    first = b'{"messages":[%b],"messages":[%b]}' % (MORE, MORE)
    reader = BodyReader()
    assert reader.read(CHAT, first) == CHAT.read(first)
    later = b'{"messages":[%b],"messages":[%b,%b]}' % (MORE, MORE, MORE)
    assert len(reader.read(CHAT, later).messages) == 2
