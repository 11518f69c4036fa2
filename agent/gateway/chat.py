"""OpenAI's chat completions.

Source of the format: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

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
    strict_json,
    text_call,
    text_content,
    text_tool,
    unsupported,
)
from conversations.messages import Message

ASKED = (
    *("temperature", "top_p", "top_k", "min_p", "stop", "seed", "logit_bias", "tool_choice"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "parallel_tool_calls"),
    *("logprobs", "top_logprobs", "reasoning_effort", "reasoning", "verbosity", "thinking"),
    *("chat_template_kwargs", "response_format"),
)
"""What clients ask for and do not get: sampling is the operator's."""

FINISH = {"stop": "stop", "calls": "tool_calls", "length": "length"}


class _Function(Lenient):
    name: str
    arguments: str | dict[str, Any] | None = None


class _Custom(Lenient):
    name: str
    input: str = ""


class _Call(Lenient):
    id: str = ""
    function: _Function | None = None
    custom: _Custom | None = None


class _Message(Lenient):
    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _StreamOptions(Lenient):
    include_usage: bool | None = None


class _Body(Body):
    messages: list[_Message]
    model: str = ""
    tools: list[dict[str, Any]] | None = None
    functions: list[Any] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = Field(default=None)


def _read(raw: bytes) -> TurnRequest:
    """The request in a body. Raises Refusal."""
    body = read_body(_Body, raw)
    _refuse_what_is_not_done(body)
    tools, custom, left_out = _tools(body.tools or [])
    asked = body.asked(ASKED)
    if body.response_format is not None:
        asked["response_format"] = body.response_format
    if left_out:
        asked["tools_left_out"] = left_out
    cap = positive(body.max_completion_tokens, "max_completion_tokens") or positive(
        body.max_tokens, "max_tokens"
    )
    return TurnRequest(
        conversation([_message(one, place) for place, one in enumerate(body.messages)]),
        tools,
        body.model,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        max_tokens=cap,
        asked=asked,
        custom=custom,
    )


def _more(request: TurnRequest, messages: list[Any]) -> TurnRequest:
    """The request with more messages. Raises Refusal and ValueError."""
    body = _Body(messages=messages)
    added = [_message(one, place) for place, one in enumerate(body.messages)]
    return replace(request, messages=conversation([*request.messages, *added]))


def _refuse_what_is_not_done(body: _Body) -> None:
    if body.n is not None and body.n != 1:
        raise unsupported("one answer a request; send the request again for another one", "n")
    if body.functions:
        raise unsupported("functions are the old form; send them as tools", "functions")
    refuse_schema((body.response_format or {}).get("type"), "response_format")


def _tools(given: list[dict[str, Any]]) -> tuple[list[Schema], frozenset[str], list[str]]:
    tools, custom, left_out = [], set(), []
    for place, tool in enumerate(given):
        kind = tool.get("type", "function")
        inner = tool.get(kind)
        where = f"tools.{place}.{kind}"
        if kind == "function" and isinstance(inner, dict):
            more = {key: inner[key] for key in ("strict",) if key in inner}
            schema = function_schema(
                inner.get("name"), inner.get("description"), inner.get("parameters"), where, **more
            )
            tools.append(schema)
        elif kind == "custom" and isinstance(inner, dict):
            tools.append(text_tool(inner.get("name"), inner.get("description"), where))
            custom.add(inner["name"])
        elif kind in ("function", "custom"):
            raise Refusal(f"{where}: must be an object", field=where)
        else:
            left_out.append(str(kind))
    return tools, frozenset(custom), left_out


def _message(given: _Message, place: int) -> Message:
    where = f"messages.{place}"
    if given.role in ("user", "tool"):
        content = content_with_images(given.content, f"{where}.content")
        if given.role == "user":
            return {"role": "user", "content": content}
        if given.tool_call_id is None:
            raise Refusal(f"{where}.tool_call_id: is missing", field=f"{where}.tool_call_id")
        return {"role": "tool", "content": content, "tool_call_id": given.tool_call_id}
    text = text_content(given.content, f"{where}.content")
    if given.role in ("system", "developer"):
        return {"role": "system", "content": text}
    if given.role != "assistant":
        raise Refusal(
            f"{where}.role: {given.role!r} is unknown; allowed are system, developer, user, "
            "assistant, tool",
            field=f"{where}.role",
        )
    calls = [_call(one, f"{where}.tool_calls.{i}") for i, one in enumerate(given.tool_calls or ())]
    return given_assistant(text, calls, given.reasoning_content or given.reasoning)


def _call(given: _Call, where: str) -> dict[str, Any]:
    if given.custom:
        return text_call(given.id, given.custom.name, given.custom.input)
    if not given.function:
        raise Refusal(f"{where}.function: is missing", field=where)
    arguments = given.function.arguments
    text = strict_json(arguments) if isinstance(arguments, dict) else arguments or ""
    return call_entry(given.id, given.function.name, text)


# ---------------------------------------------------------------------- answers


def _whole(answer: Answer, request: TurnRequest) -> bytes:
    """The body of a `chat.completion`."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or None}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_written_call(call, request) for call in answer.calls]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": FINISH[answer.finish],
        "logprobs": None,
    }
    head = _head(answer, request, "chat.completion")
    return json_bytes({**head, "choices": [choice], "usage": _usage(answer)})


def _stream(answer: Answer, request: TurnRequest) -> bytes:
    """All chunks, and [DONE]."""
    head = _head(answer, request, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "choices": [choice]})

    chunks = [chunk({"role": "assistant", "content": ""})]
    if answer.reasoning:
        chunks.append(chunk({"reasoning_content": answer.reasoning}))
    if answer.content:
        chunks.append(chunk({"content": answer.content}))
    for index, call in enumerate(answer.calls):
        chunks.append(chunk({"tool_calls": [{"index": index, **_written_call(call, request)}]}))
    chunks.append(chunk({}, FINISH[answer.finish]))
    if request.include_usage:
        chunks.append(_event({**head, "choices": [], "usage": _usage(answer)}))
    return b"".join([*chunks, b"data: [DONE]\n\n"])


def _head(answer: Answer, request: TurnRequest, kind: str) -> dict[str, Any]:
    return {
        "id": _response_id(answer.name),
        "object": kind,
        "created": answer.created,
        "model": request.model,
    }


def _written_call(call: AnsweredCall, request: TurnRequest) -> dict[str, Any]:
    if call.name in request.custom:
        return {
            "id": call.id,
            "type": "custom",
            "custom": {"name": call.name, "input": input_of(call)},
        }
    return call_entry(call.id, call.name, call.arguments)


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.sampled_tokens,
        "total_tokens": answer.prompt_tokens + answer.sampled_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(data) + b"\n\n"


# ---------------------------------------------------------------------- errors


def _error_event(refusal: Refusal) -> bytes:
    """The refusal in a stream that has begun."""
    return _event({"error": openai_error_object(refusal)})


def _response_id(name: str) -> str:
    """The id of a completion."""
    return f"chatcmpl-{name}"


CHAT = ApiDialect(
    "chat",
    _read,
    _whole,
    _stream,
    openai_error,
    _error_event,
    b": keep-alive\n\n",
    _response_id,
    _more,
)
