"""What a template is asked at load: probe messages, and how it wants messages at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.template.renderer import Renderer, Schema
from conversations.template.views import Dialect
from conversations.tokens import USER

CONTENT_MARK, CALL_MARK = "a4b1turntrace", "c8d2turntrace"
"""Stand in a stub's assistant turn, in its content and in its last call's arguments."""


def tool_schema(name: str, properties: dict[str, Any]) -> Schema:
    """The schema of a probe tool; all its parameters are required."""
    parameters = {
        "type": "object",
        "properties": {key: {"description": key, **schema} for key, schema in properties.items()},
        "required": list(properties),
    }
    function = {"name": name, "description": f"does {name}", "parameters": parameters}
    return {"type": "function", "function": function}


PROBE_TOOL = tool_schema("f", {"x": {"type": "string"}})
OTHER_TOOL = tool_schema("other", {"y": {"type": "integer"}})


def probe_call(name: str, call_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as a record keeps it."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def answers(calls: Sequence[dict[str, Any]], contents: Sequence[str]) -> list[Message]:
    """Tool messages with these contents; those without a call of their own answer the last one."""
    last = len(calls) - 1
    return [
        {
            "role": "tool",
            "content": content,
            "tool_call_id": calls[min(index, last)]["id"],
            "name": calls[min(index, last)]["function"]["name"],
        }
        for index, content in enumerate(contents)
    ]


def user(content: str) -> Message:
    return {"role": USER, "content": content}


def renders(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Schema]) -> bool:
    """False if the template refuses messages (a system message, say)."""
    try:
        return bool(renderer.whole(messages, tools, generation=False))
    except TemplateError:
        return False


def find_dialect(renderer: Renderer) -> Dialect:
    """How the template wants calls and thoughts: the first way that it takes, and prints if one
    does.
    """
    ways = [
        Dialect(arguments_as_text=as_text, short_ids=short, no_content=no_content)
        for no_content in (False, True)
        for short in (False, True)
        for as_text in (False, True)
    ]
    shown = [(way, _shown_call(renderer, way)) for way in ways]
    takes = [way for way, printed in shown if printed is not None]
    prints = [way for way, printed in shown if printed]
    found = (prints or takes or ways)[0]
    return dataclasses.replace(found, reasoning_key=_reasoning_key(renderer, found))


def _shown_call(renderer: Renderer, way: Dialect) -> bool | None:
    """Whether the template prints a call that it is given in this way; None if it refuses it."""
    one = probe_call("f", "call_0_0", {"x": "argument9"})
    turn: Message = {"role": "assistant", "content": "", "tool_calls": [one]}
    renderer.dialect = way
    try:
        messages = [user("u"), turn, *answers([one], ["2"])]
        text = renderer.whole(messages, [PROBE_TOOL, OTHER_TOOL], generation=False)
    except TemplateError:
        return None
    return "argument9" in text


def _reasoning_key(renderer: Renderer, found: Dialect) -> str | None:
    """The key whose thought the template prints in the turn that it ends with."""
    thought = "thoughtful9"
    turn: Message = {"role": "assistant", "content": "", "reasoning_content": thought}
    with_call = {**turn, "tool_calls": [probe_call("f", "call_0_0", {"x": "1"})]}
    for key in ("reasoning_content", "thinking", "reasoning"):
        renderer.dialect = dataclasses.replace(found, reasoning_key=key)
        for last in (with_call, {**turn, "content": "a"}):
            try:
                text = renderer.whole([user("u"), last], [PROBE_TOOL], generation=False)
            except TemplateError:
                continue
            if thought in text:
                return key
    return None
