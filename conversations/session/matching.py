"""When a message that a client sends is the one that the session has.

The rules, each needed by clients that were recorded (facts: what real clients send):

- Only role, text, calls and the answered call count. Keys that no template reads do not (`index`,
  `refusal`, `cache_control`): Claude Code, inspect-ai, streamed SDKs.
- No content, null and the empty string are one: openai streamed, OpenHands.
- Arguments of calls are compared as JSON, numbers by value: opencode, pi, qwen-code, pydantic-ai,
  langchain, OpenHands. A client in JavaScript writes 1.0 as 1, and 2^60 as a rounded number.
- An argument that the client adds counts as there if it is the default that the tool's schema
  names: Claude Code completes the arguments of a call before it sends the call back.
- Thoughts are never compared: openai-agents, langchain, OpenHands and qwen-code drop or strip them.
- Blanks around an assistant's text do not count: inspect-ai, smolagents.
- Tool messages are put in the order of the calls: Claude Code sends them as they complete.
- An assistant message with exactly the call ids of a turn is that turn if every call that differs
  was malformed or unknown when it was sampled: clients rewrite those, each in its own way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from conversations.messages import Message

Calls = Sequence[Mapping[str, Any]]


def same_given(one: Message, other: Message) -> bool:
    """Whether two messages that the client wrote are the same."""
    if one["role"] != other["role"]:
        return False
    if one["role"] == "assistant":
        return same_text(one, other) and same_calls(calls_of(one), calls_of(other))
    return bool(
        one["content"] == other["content"] and one.get("tool_call_id") == other.get("tool_call_id")
    )


def same_text(one: Message, other: Message) -> bool:
    """Whether two assistant messages say the same, blanks around it aside."""
    first, second = one["content"], other["content"]
    if isinstance(first, str) and isinstance(second, str):
        return first == second or first.strip() == second.strip()
    return bool(first == second)


def is_echo(
    message: Message, served: Message, invalid: Sequence[bool], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether an assistant message is the turn that was served, `tools` being offered.

    `invalid` [number of served calls]: which of them were malformed or unknown when sampled.
    """
    if message["role"] != "assistant":
        return False
    sent, known = calls_of(message), calls_of(served)
    if same_text(message, served) and same_calls(sent, known):
        return True
    if not known or call_ids(message) != call_ids(served):
        return False
    return all(
        wrong or same_call(one, other) or _is_completed(one, other, tools)
        for one, other, wrong in zip(sent, known, invalid, strict=True)
    )


def is_verbatim(message: Message, served: Message) -> bool:
    """Whether a template sees the same in the echo as in the turn: text, thoughts, arguments."""
    return bool(
        message["content"] == served["content"]
        and (message.get("reasoning_content") or "") == (served.get("reasoning_content") or "")
        and _written(message) == _written(served)
    )


def _written(message: Message) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls_of(message)]


def calls_of(message: Message) -> Calls:
    """The calls of an assistant message."""
    return message.get("tool_calls") or ()


def call_ids(message: Message) -> list[Any]:
    """The ids of an assistant message's calls, in order."""
    return [call.get("id") for call in calls_of(message)]


def same_calls(one: Calls, other: Calls) -> bool:
    """Whether names and arguments are the same, call by call."""
    return len(one) == len(other) and all(map(same_call, one, other))


def same_call(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether name and arguments of two calls are the same."""
    first, second = one["function"], other["function"]
    if first["name"] != second["name"]:
        return False
    return first["arguments"] == second["arguments"] or _same_text_of_json(
        first["arguments"], second["arguments"]
    )


def _same_text_of_json(one: str, other: str) -> bool:
    try:
        return same_json(json.loads(one), json.loads(other))
    except (ValueError, RecursionError):
        return False


def _is_completed(
    sent: Mapping[str, Any], known: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether a call differs from the served one by defaults of its tool's schema alone."""
    name = known["function"]["name"]
    if sent["function"]["name"] != name:
        return False
    offered = (tool["function"] for tool in tools)
    schema = next((one.get("parameters") for one in offered if one["name"] == name), None)
    try:
        one, other = (json.loads(call["function"]["arguments"]) for call in (sent, known))
        return _same_but_defaults(one, other, schema)
    except (ValueError, RecursionError):
        return False


def _same_but_defaults(sent: object, known: object, schema: object) -> bool:
    """Whether `sent` is `known`, defaults of `schema` added. The schema is the client's own."""
    if isinstance(sent, dict) and isinstance(known, dict):
        inner = _part(schema, "properties")
        return known.keys() <= sent.keys() and all(
            _same_but_defaults(value, known[key], _part(inner, key))
            if key in known
            else _is_default(value, _part(inner, key))
            for key, value in sent.items()
        )
    if isinstance(sent, list) and isinstance(known, list):
        items = _part(schema, "items")
        pairs = zip(sent, known, strict=False)
        return len(sent) == len(known) and all(
            _same_but_defaults(one, other, items) for one, other in pairs
        )
    return same_json(sent, known)


def _is_default(value: object, schema: object) -> bool:
    return (
        isinstance(schema, Mapping) and "default" in schema and same_json(value, schema["default"])
    )


def _part(schema: object, key: str) -> object:
    return schema.get(key) if isinstance(schema, Mapping) else None


def same_json(one: object, other: object) -> bool:
    """Whether two JSON values are the same: 1 is 1.0 but not true, keys have no order."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if _is_number(one) and _is_number(other):
        return one == other or _as_float(one) == _as_float(other)
    return type(one) is type(other) and one == other


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The messages, each run of tool messages in the order of the calls before it.

    A template that prints no ids would show the model an answer under another call.
    """
    ordered: list[Message] = []
    places: dict[Any, int] = {}
    run: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            run.append(message)
            continue
        ordered += _sorted(run, places)
        run = []
        if message["role"] == "assistant":
            places = {call_id: place for place, call_id in enumerate(call_ids(message))}
        ordered.append(message)
    return ordered + _sorted(run, places)


def _sorted(run: list[Message], places: Mapping[Any, int]) -> list[Message]:
    if len(run) < 2:
        return run
    last = len(places)
    return sorted(run, key=lambda message: places.get(message.get("tool_call_id"), last))
