"""Chat messages in the OpenAI schema, and the two things a model's tool call can be.

A message is a plain dict, as it stands in task files and records. A sampled assistant message
carries `raw`, the exact text of its sampled ids; a given one has `raw: None`. A call that could not
be parsed keeps its text verbatim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conversations.errors import MessageError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


arguments_text = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
"""A call's arguments as OpenAI's schema has them: one JSON text."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that parsed: a name and a JSON object. `raw` is the block as sampled, tags included.

    `id` is the id that the model wrote, in the formats that have one (Kimi, Mistral).
    """

    name: str
    arguments: dict[str, Any]
    raw: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class MalformedToolCall:
    """A call that did not parse. `raw` is the block as sampled, tags included; `error` says what is
    wrong with it.
    """

    raw: str
    error: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What one assistant turn says: `content` is its text without the call blocks, `calls` are in
    order.

    `reasoning` is the text of its thoughts, None if it has none or they were not taken out of
    `content`.
    """

    content: str
    calls: tuple[ToolCall | MalformedToolCall, ...] = ()
    reasoning: str | None = None


def assistant_message(raw: str, parsed: ParsedTurn, call_ids: Sequence[str]) -> Message:
    """The message of a sampled turn. `call_ids` [number of calls] name the calls in order.

    A malformed call stands among the `tool_calls` with `malformed: true` and its verbatim block as
    `arguments`. A call with an id that the model wrote has it as `written_id`: ids of ours are
    unique.
    """
    message: Message = {"role": "assistant", "content": parsed.content, "raw": raw}
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        message["tool_calls"] = [
            _tool_call(call, call_id) for call, call_id in zip(parsed.calls, call_ids, strict=True)
        ]
    return message


def _tool_call(call: ToolCall | MalformedToolCall, call_id: str) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        function = {"name": call.name, "arguments": arguments_text(call.arguments)}
        written = {"written_id": call.id} if call.id is not None else {}
        return {"id": call_id, **written, "type": "function", "function": function}
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": call.name or "", "arguments": call.raw},
        "malformed": True,
    }


def tool_message(content: str, *, call_id: str | None, name: str | None) -> Message:
    """The message that answers one call. `call_id` is None for what a tool said when it was
    created.
    """
    message: Message = {"role": "tool", "content": content}
    if call_id is not None:
        message["tool_call_id"] = call_id
    if name:
        message["name"] = name
    return message


def given_messages(messages: object) -> list[Message]:
    """Checks a task's messages and returns them as the record keeps them.

    Text parts (`[{"type": "text", "text": ...}]`) become one string, an assistant's missing content
    the empty string, and given assistant messages get `raw: None`. Raises MessageError on anything
    that is not in the OpenAI chat schema.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise MessageError(
            "messages must be a non-empty list of {role, content} objects, "
            f"got {_shape(messages)}"
        )
    return [_given(message, index) for index, message in enumerate(messages)]


def _given(message: object, index: int) -> Message:
    if not isinstance(message, Mapping):
        raise MessageError(
            f"message {index} must be an object with role and content, got {_shape(message)}"
        )
    # Parquet gives every row of a struct column every key: a null stands for a missing one.
    kept: Message = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise MessageError(f"message {index} has role {role!r}; allowed are {', '.join(ROLES)}")
    if role != "assistant" and "content" not in kept:
        raise MessageError(
            f"message {index} ({role}) has no content; "
            f"its keys: {', '.join(sorted(map(str, kept)))}"
        )
    kept["content"] = _text(kept.get("content", ""), index)
    if "tool_calls" in kept:
        kept["tool_calls"] = _given_calls(kept["tool_calls"], index)
    if role == "assistant":
        kept["raw"] = None
    return kept


def _text(content: object, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise MessageError(
        f"message {index} has content of {_shape(content)}; "
        "only text (a string or text parts) is supported"
    )


def _given_calls(calls: object, index: int) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise MessageError(
            f"message {index} has tool_calls of {_shape(calls)}; "
            "expected a list of {id, type, function} objects"
        )
    return [_given_call(call, index) for call in calls]


def _given_call(call: object, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
    ):
        raise MessageError(
            f"message {index} has a tool call without function.name; "
            "expected {id, type, function: {name, arguments}}"
        )
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else arguments_text(arguments)
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": text}}


def _shape(value: object) -> str:
    return (
        f"an empty {type(value).__name__}" if value in ([], "", ()) else f"{type(value).__name__}"
    )
