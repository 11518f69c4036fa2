"""Anthropic's messages.

Source of the format: https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from agent.gateway.answer import Answer, json_bytes
from agent.gateway.dialect import ApiDialect
from agent.gateway.request import (
    Body,
    Lenient,
    Refusal,
    Schema,
    TurnRequest,
    call_entry,
    conversation,
    function_schema,
    given_assistant,
    image_part,
    joined_parts,
    positive,
    read_body,
    refuse_schema,
    strict_json,
    text_part,
    unsupported,
)
from conversations.messages import Message

ASKED = (
    *("temperature", "top_p", "top_k", "stop_sequences", "tool_choice", "thinking"),
    *("context_management", "output_config"),
)
"""What clients ask for and do not get: sampling is the operator's."""

BILLING = "x-anthropic-billing-header:"
"""Claude Code's first system block: a header of the request, not a part of the prompt."""

FINISH = {"stop": "end_turn", "calls": "tool_use", "length": "max_tokens"}


class _Source(Lenient):
    type: str
    media_type: str = ""
    data: str = ""


class _Block(Lenient):
    type: str
    source: _Source | None = None
    text: str | None = None
    thinking: str | None = None
    id: str = ""
    name: str = ""
    input: Any = None
    tool_use_id: str = ""
    content: str | list[_Block] | None = None


class _Message(Lenient):
    role: str
    content: str | list[_Block]


class _Body(Body):
    messages: list[_Message]
    model: str = ""
    system: str | list[_Block] | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    output_format: dict[str, Any] | None = None


def _read(raw: bytes) -> TurnRequest:
    """The request in a body. Raises Refusal."""
    body = read_body(_Body, raw)
    refuse_schema((body.output_format or {}).get("type"), "output_format")
    asked = body.asked(ASKED)
    formats = asked.get("output_config")
    if isinstance(formats, dict) and isinstance(formats.get("format"), dict):
        refuse_schema(formats["format"].get("type"), "output_config.format")
    tools, left_out = _tools(body.tools or [])
    if left_out:
        asked["tools_left_out"] = left_out
    given = _given(body)
    return TurnRequest(
        conversation([*_system(body.system), *given]),
        tools,
        body.model,
        stream=bool(body.stream),
        max_tokens=positive(body.max_tokens, "max_tokens"),
        asked=asked,
    )


def _more(request: TurnRequest, messages: list[Any]) -> TurnRequest:
    """The request with more messages. Raises Refusal and ValueError."""
    added = _given(_Body(messages=messages))
    return replace(request, messages=conversation([*request.messages, *added]))


def _given(body: _Body) -> list[Message]:
    return [
        message
        for place, one in enumerate(body.messages)
        for message in _messages(one, f"messages.{place}")
    ]


def _system(given: str | list[_Block] | None) -> list[Message]:
    texts = [given] if isinstance(given, str) else [block.text or "" for block in given or ()]
    return [{"role": "system", "content": text} for text in texts if not text.startswith(BILLING)]


def _tools(given: list[dict[str, Any]]) -> tuple[list[Schema], list[str]]:
    tools, left_out = [], []
    for place, tool in enumerate(given):
        if tool.get("type", "custom") in ("custom", None):
            schema = tool.get("input_schema")
            tools.append(
                function_schema(tool.get("name"), tool.get("description"), schema, f"tools.{place}")
            )
        else:
            left_out.append(str(tool["type"]))
    return tools, left_out


def _messages(given: _Message, where: str) -> Iterator[Message]:
    """The messages in one of Anthropic's: what tools said comes before what the user adds."""
    blocks = given.content
    if isinstance(blocks, str):
        blocks = [_Block(type="text", text=blocks)]
    if given.role == "assistant":
        yield _assistant(blocks, where)
    elif given.role in ("user", "system"):
        said = [block for block in blocks if block.type == "tool_result"]
        for block in said:
            content = block.content
            said_there = content if isinstance(content, str) else _content(content or (), where)
            yield {"role": "tool", "content": said_there, "tool_call_id": block.tool_use_id}
        rest = [block for block in blocks if block.type != "tool_result"]
        if rest or not said:
            read = _content if given.role == "user" else _text
            yield {"role": given.role, "content": read(rest, where)}
    else:
        raise Refusal(
            f"{where}.role: {given.role!r} is unknown; allowed are user and assistant",
            field=f"{where}.role",
        )


def _assistant(blocks: Sequence[_Block], where: str) -> Message:
    thoughts = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    calls = [
        call_entry(block.id, block.name, _json(block.input))
        for block in blocks
        if block.type == "tool_use"
    ]
    hidden = ("thinking", "redacted_thinking", "tool_use")
    text = _text([block for block in blocks if block.type not in hidden], where)
    return given_assistant(text, calls, thoughts)


def _content(blocks: Sequence[_Block], where: str) -> Any:
    """The text of blocks, or parts if there are images."""
    if all(block.type != "image" for block in blocks):
        return _text(blocks, where)
    return joined_parts(
        [
            _image(block, where) if block.type == "image" else text_part(_text([block], where))
            for block in blocks
        ]
    )


def _image(block: _Block, where: str) -> dict[str, Any]:
    source = block.source
    if source is None or source.type != "base64":
        kind = repr(source.type) if source else "none"
        raise unsupported(
            f"an image with a source of type {kind} is not followed; send it as base64",
            f"{where}.content",
        )
    return image_part(f"data:{source.media_type};base64,{source.data}", f"{where}.content")


def _text(blocks: Sequence[_Block], where: str) -> str:
    for block in blocks:
        if block.type != "text":
            raise unsupported(
                f"a block of type {block.type!r}; only text is read here", f"{where}.content"
            )
    return "".join(block.text or "" for block in blocks)


def _json(arguments: object) -> str:
    return strict_json(arguments if isinstance(arguments, dict) else {})


# ---------------------------------------------------------------------- answers


def _whole(answer: Answer, request: TurnRequest) -> bytes:
    """The body of a message."""
    return json_bytes(
        {
            **_head(answer, request),
            "content": _blocks(answer),
            "stop_reason": FINISH[answer.finish],
            "usage": _usage(answer),
        }
    )


def _stream(answer: Answer, request: TurnRequest) -> bytes:
    """All events of a message."""
    begun = {**_head(answer, request), "content": [], "stop_reason": None, "usage": _usage(answer)}
    events = [_event("message_start", message=begun)]
    for index, block in enumerate(_blocks(answer)):
        empty, deltas = _pieces(block)
        events.append(_event("content_block_start", index=index, content_block=empty))
        events += [_event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(_event("content_block_stop", index=index))
    ended = {"stop_reason": FINISH[answer.finish], "stop_sequence": None}
    events.append(_event("message_delta", delta=ended, usage=_usage(answer)))
    return b"".join([*events, _event("message_stop")])


def _pieces(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it starts, and what is added to it."""
    if block["type"] == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if block["type"] == "text":
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    text = json_bytes(block["input"]).decode()
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]


def _head(answer: Answer, request: TurnRequest) -> dict[str, Any]:
    return {
        "id": _response_id(answer.name),
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "stop_sequence": None,
    }


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning is not None:
        blocks.append(
            {"type": "thinking", "thinking": answer.reasoning, "signature": answer.signature}
        )
    if answer.content or not answer.calls:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        blocks.append(
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.object()}
        )
    return blocks


def _usage(answer: Answer) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the others."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": answer.sampled_tokens,
    }


def _event(kind: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes({"type": kind, **data}))


# ---------------------------------------------------------------------- errors


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def _error_object(refusal: Refusal) -> dict[str, Any]:
    message = refusal.message
    if refusal.tokens:
        prompt, limit = refusal.tokens
        message = f"prompt is too long: {prompt} tokens > {limit} maximum"
    return {"type": _TYPES.get(refusal.status, "invalid_request_error"), "message": message}


def _error(refusal: Refusal) -> bytes:
    """The body of a refusal."""
    return json_bytes({"type": "error", "error": _error_object(refusal)})


def _error_event(refusal: Refusal) -> bytes:
    """The refusal in a stream that has begun."""
    return _event("error", error=_error_object(refusal))


def _response_id(name: str) -> str:
    """The id of a message."""
    return f"msg_{name}"


PING = b'event: ping\ndata: {"type": "ping"}\n\n'

ANTHROPIC = ApiDialect(
    "anthropic", _read, _whole, _stream, _error, _error_event, PING, _response_id, _more
)
