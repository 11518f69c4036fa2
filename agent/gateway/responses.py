"""OpenAI's responses.

Source of the format: https://platform.openai.com/docs/api-reference/responses. Items up to the next
output of a tool or message of a user are one assistant message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent.gateway.answer import Answer, AnsweredCall, input_of, json_bytes
from agent.gateway.dialect import ApiDialect
from agent.gateway.openai_error import openai_error, openai_error_object
from agent.gateway.request import (
    Body,
    Lenient,
    Refusal,
    Schema,
    TextPart,
    TurnRequest,
    call_entry,
    content_with_images,
    conversation,
    function_schema,
    given_assistant,
    positive,
    read_body,
    refuse_schema,
    text_call,
    text_content,
    text_tool,
    unsupported,
)
from conversations.messages import Message

ASKED = (
    *("temperature", "top_p", "tool_choice", "parallel_tool_calls", "reasoning", "truncation"),
    *("top_logprobs", "max_tool_calls", "text"),
)
"""What clients ask for and do not get: sampling is the operator's."""

NOT_A_MESSAGE = frozenset({"additional_tools", "web_search_call", "file_search_call"})
"""Items that no chat template renders."""


class _Item(Lenient):
    type: str = "message"
    role: str = ""
    content: str | list[TextPart] | None = None
    summary: list[TextPart] | None = None
    name: str = ""
    namespace: str | None = None
    arguments: str = ""
    input: str = ""
    call_id: str = ""
    output: str | list[TextPart] | None = None


class _Body(Body):
    input: str | list[_Item]
    model: str = ""
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


def _read(raw: bytes) -> TurnRequest:
    """The request in a body. Raises Refusal."""
    body = read_body(_Body, raw)
    for name in ("background", "conversation", "prompt"):
        if getattr(body, name):
            raise unsupported("nothing is kept here but the session; send the input", name)
    asked = body.asked(ASKED)
    text = asked.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict):
        refuse_schema(text["format"].get("type"), "text.format")
    tools = _Tools()
    tools.add(body.tools or [], "tools")
    if tools.left_out:
        asked["tools_left_out"] = tools.left_out
    items = body.input
    if isinstance(items, str):
        items = [_Item(role="user", content=items)]
    head: list[Message] = (
        [{"role": "system", "content": body.instructions}] if body.instructions else []
    )
    return TurnRequest(
        conversation([*head, *_messages(items, tools)]),
        tools.schemas,
        body.model,
        stream=bool(body.stream),
        max_tokens=positive(body.max_output_tokens, "max_output_tokens"),
        asked=asked,
        previous_id=body.previous_response_id,
        custom=frozenset(tools.custom),
        aliases=tools.aliases,
    )


@dataclass(slots=True)
class _Tools:
    """The tools of a request. Those in namespaces are offered among the others."""

    schemas: list[Schema] = field(default_factory=list)
    custom: set[str] = field(default_factory=set)
    aliases: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def add(self, given: Iterable[object], where: str, namespace: str | None = None) -> None:
        for place, tool in enumerate(given):
            if not isinstance(tool, dict):
                raise Refusal(f"{where}.{place}: must be an object", field=where)
            self._add(tool, f"{where}.{place}", namespace)

    def _add(self, tool: dict[str, Any], where: str, namespace: str | None) -> None:
        kind = tool.get("type")
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            self.add(tool["tools"], f"{where}.tools", str(tool.get("name", "")))
        elif kind == "function":
            name = self._name(tool.get("name"), namespace)
            more = {key: tool[key] for key in ("strict",) if key in tool}
            self.schemas.append(
                function_schema(
                    name, tool.get("description"), tool.get("parameters"), where, **more
                )
            )
        elif kind == "custom":
            name = self._name(tool.get("name"), namespace)
            self.schemas.append(text_tool(name, tool.get("description"), where))
            self.custom.add(str(name))
        else:
            self.left_out.append(str(kind))

    def _name(self, name: object, namespace: str | None) -> object:
        """The name that is offered; with its namespace if another tool has it already."""
        if not isinstance(name, str):
            return name
        offered = f"{namespace}__{name}" if namespace and name in self.names else name
        self.names.add(offered)
        if namespace:
            self.aliases[offered] = namespace, name
        return offered

    def offered_name(self, name: str, namespace: str | None) -> str:
        """The name under which a tool that the client names was offered."""
        if namespace is None:
            return name
        return next((k for k, alias in self.aliases.items() if alias == (namespace, name)), name)


# ---------------------------------------------------------------------- items to messages


@dataclass(slots=True)
class _Turn:
    """The items of one assistant message so far."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    any: bool = False

    def message(self) -> Message:
        return given_assistant("".join(self.texts), self.calls, "".join(self.thoughts))


def _messages(items: list[_Item], tools: _Tools) -> Iterator[Message]:
    turn = _Turn()
    for place, item in enumerate(items):
        where = f"input.{place}"
        if _is_the_models(item):
            _add_to(turn, item, tools, where)
            turn.any = True
            continue
        if turn.any:
            yield turn.message()
            turn = _Turn()
        yield from _others(item, where)
    if turn.any:
        yield turn.message()


def _is_the_models(item: _Item) -> bool:
    return item.type in ("reasoning", "function_call", "custom_tool_call") or (
        item.type == "message" and item.role == "assistant"
    )


def _add_to(turn: _Turn, item: _Item, tools: _Tools, where: str) -> None:
    if item.type == "reasoning":
        content = item.content if isinstance(item.content, list) else None
        turn.thoughts += [part.text or "" for part in content or item.summary or ()]
    elif item.type == "function_call":
        name = tools.offered_name(item.name, item.namespace)
        turn.calls.append(call_entry(item.call_id, name, item.arguments))
    elif item.type == "custom_tool_call":
        turn.calls.append(text_call(item.call_id, item.name, item.input))
    else:
        turn.texts.append(text_content(item.content, f"{where}.content"))


def _others(item: _Item, where: str) -> Iterator[Message]:
    if item.type in ("function_call_output", "custom_tool_call_output"):
        content = content_with_images(item.output, f"{where}.output")
        yield {"role": "tool", "content": content, "tool_call_id": item.call_id}
    elif item.type == "message" and item.role in ("user", "system", "developer"):
        if item.role == "user":
            yield {"role": "user", "content": content_with_images(item.content, f"{where}.content")}
        else:
            yield {"role": "system", "content": text_content(item.content, f"{where}.content")}
    elif item.type == "message":
        raise Refusal(
            f"{where}.role: {item.role!r} is unknown; allowed are system, developer, user, "
            "assistant",
            field=f"{where}.role",
        )
    elif item.type not in NOT_A_MESSAGE:
        raise unsupported(f"an item of type {item.type!r}", f"{where}.type")


# ---------------------------------------------------------------------- answers


def _whole(answer: Answer, request: TurnRequest) -> bytes:
    """The body of a response."""
    return json_bytes(_response(answer, request))


def _stream(answer: Answer, request: TurnRequest) -> bytes:
    """All events of a response, numbered."""
    ended = _response(answer, request)
    begun = {
        **ended,
        "status": "in_progress",
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
    ]
    for index, item in enumerate(ended["output"]):
        events.append(("response.output_item.added", {"output_index": index, "item": _empty(item)}))
        place = {"item_id": item["id"], "output_index": index}
        events += [(kind, {**place, **data}) for kind, data in _growth(item)]
        events.append(("response.output_item.done", {"output_index": index, "item": item}))
    events.append((f"response.{ended['status']}", {"response": ended}))
    return b"".join(_event(kind, number, data) for number, (kind, data) in enumerate(events))


def _event(kind: str, number: int, data: dict[str, Any]) -> bytes:
    text = json_bytes({"type": kind, "sequence_number": number, **data})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), text)


def _response(answer: Answer, request: TurnRequest) -> dict[str, Any]:
    is_cut = answer.finish == "length"
    return {
        "id": _response_id(answer.name),
        "object": "response",
        "created_at": answer.created,
        "status": "incomplete" if is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": None,
        "max_output_tokens": request.max_tokens,
        "model": request.model,
        "output": _items(answer, request),
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_id,
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "metadata": {},
        "usage": _usage(answer),
    }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.sampled_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.sampled_tokens,
    }


def _items(answer: Answer, request: TurnRequest) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if answer.reasoning is not None:
        items.append(
            {
                "type": "reasoning",
                "id": f"rs_{answer.name}",
                "summary": [{"type": "summary_text", "text": answer.reasoning}],
                "encrypted_content": answer.signature,
            }
        )
    if answer.content or not answer.calls:
        part = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{answer.name}",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
        )
    for index, call in enumerate(answer.calls):
        items.append(_call_item(call, request, f"{answer.name}-{index}"))
    return items


def _call_item(call: AnsweredCall, request: TurnRequest, name: str) -> dict[str, Any]:
    space, tool = request.aliases.get(call.name, (None, call.name))
    named = {"name": tool, **({"namespace": space} if space else {})}
    about = {"call_id": call.id, **named, "status": "completed"}
    if call.name in request.custom:
        return {"type": "custom_tool_call", "id": f"ctc_{name}", **about, "input": input_of(call)}
    return {"type": "function_call", "id": f"fc_{name}", **about, "arguments": call.arguments}


def _empty(item: dict[str, Any]) -> dict[str, Any]:
    """The item as it starts."""
    grows: dict[str, dict[str, Any]] = {
        "reasoning": {"summary": []},
        "message": {"content": [], "status": "in_progress"},
        "function_call": {"arguments": "", "status": "in_progress"},
        "custom_tool_call": {"input": "", "status": "in_progress"},
    }
    return {**item, **grows[item["type"]]}


def _growth(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events by which an item becomes whole."""
    if item["type"] == "reasoning":
        part = item["summary"][0]
        place = {"summary_index": 0}
        start = "response.reasoning_summary"
        yield f"{start}_part.added", {**place, "part": {**part, "text": ""}}
        yield f"{start}_text.delta", {**place, "delta": part["text"]}
        yield f"{start}_text.done", {**place, "text": part["text"]}
        yield f"{start}_part.done", {**place, "part": part}
    elif item["type"] == "message":
        part = item["content"][0]
        place = {"content_index": 0}
        yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
        yield "response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}
        yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
        yield "response.content_part.done", {**place, "part": part}
    elif item["type"] == "function_call":
        start = "response.function_call_arguments"
        yield f"{start}.delta", {"delta": item["arguments"]}
        yield f"{start}.done", {"arguments": item["arguments"], "name": item["name"]}
    else:
        start = "response.custom_tool_call_input"
        yield f"{start}.delta", {"delta": item["input"]}
        yield f"{start}.done", {"input": item["input"]}


# ---------------------------------------------------------------------- errors


def _error_event(refusal: Refusal) -> bytes:
    """The refusal in a stream that has begun."""
    kind = "response.failed"
    about = {"code": "server_error", "message": refusal.message}
    failed = {
        "id": "",
        "object": "response",
        "status": "failed",
        "output": [],
        "error": {**openai_error_object(refusal), **about},
    }
    return _event(kind, 0, {"response": failed})


def _response_id(name: str) -> str:
    """The id of a response."""
    return f"resp_{name}"


RESPONSES = ApiDialect(
    "responses",
    _read,
    _whole,
    _stream,
    openai_error,
    _error_event,
    b": keep-alive\n\n",
    _response_id,
)
