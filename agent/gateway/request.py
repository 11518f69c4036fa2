"""A request for a turn in any dialect, as the session sees it, and why a request is refused.

Invariant: the messages are those of the chat schema, with the keys that a chat template reads and
no others: two clients that mean the same conversation give the same messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from conversations.messages import Message

Schema = dict[str, Any]
"""An OpenAI tool schema: `{"type": "function", "function": {name, description, parameters}}`."""

MAX_BODY_BYTES = 64 << 20


class Refusal(Exception):  # noqa: N818 - an answer to the client, not a fault of ours
    """A request that gets no turn: an HTTP status, a code and one line for the client.

    `tokens` are (tokens of the prompt, tokens that fit) if the prompt is too long: each dialect has
    its own words for that. `retry_after_s` goes into the header of the same name.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        field: str | None = None,
        tokens: tuple[int, int] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.field = field
        self.tokens = tokens
        self.retry_after_s = retry_after_s


def too_long(prompt: int, limit: int) -> Refusal:
    """The refusal of a prompt of `prompt` tokens where `limit` fit."""
    return Refusal(
        f"This model's maximum context length is {limit} tokens. However, your messages resulted "
        f"in {prompt} tokens. Please reduce the length of the messages.",
        code="context_length_exceeded",
        tokens=(prompt, limit),
    )


def unsupported(what: str, field: str) -> Refusal:
    """The refusal of something that the gateway does not do, by name."""
    return Refusal(f"{field}: {what}", code="unsupported", field=field)


def refuse_schema(kind: object, field: str) -> None:
    """Raises Refusal if an output format would constrain what is sampled."""
    if kind not in (None, "text"):
        raise unsupported(f"{kind!r} would constrain the sampling; only text is sampled", field)


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a client asks: the next turn after `messages`, with `tools` offered.

    `max_tokens`: the most that the client wants sampled. `asked`: what it wants and does not get,
    such as a temperature; kept in the record. `previous_id`: the response after which `messages`
    stand. `custom`: names of tools whose arguments are one text. `aliases`: {name offered:
    (namespace, name)} of tools that the client keeps in namespaces.
    """

    messages: list[Message]
    tools: list[Schema]
    model: str
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    previous_id: str | None = None
    custom: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, str]] = field(default_factory=dict)


# ---------------------------------------------------------------------- reading a body


class Lenient(BaseModel):
    """An object of a request. Keys that nobody here reads are tolerated."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Body(BaseModel):
    """A request's body; keys that are not fields stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def asked(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of `names` that the body has."""
        extra = self.model_extra or {}
        return {name: extra[name] for name in names if extra.get(name) is not None}


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], raw: bytes) -> B:
    """The body as `kind`. Raises Refusal with the place and the problem of the first mistake.

    A long history costs half the time with orjson, which does not read every number: what it cannot
    read, and what is wrong, pydantic's own reader reads again.
    """
    try:
        value = orjson.loads(raw)
        if not has_rounded(value):
            return kind.model_validate(value)
    except (ValueError, RecursionError):
        pass
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
    if finding["type"] == "json_invalid" and (whole := _with_whole_characters(raw)) != raw:
        return read_body(kind, whole)
    place = ".".join(str(part) for part in finding["loc"] if not _names_a_type(part))
    if finding["type"] == "json_invalid":
        raise Refusal(f"the body is not JSON: {finding['ctx']['error']}", code="invalid_json")
    message = finding["msg"]
    if finding["type"] == "extra_forbidden":
        message = f"is unknown; known are {', '.join(kind.model_fields)}"
    raise Refusal(f"{place or 'the body'}: {message}", field=place or None)


def has_rounded(value: object) -> bool:
    """Whether a number may have been an integer of more than 64 bits, which orjson rounds."""
    if isinstance(value, dict):
        return any(map(has_rounded, value.values()))
    if isinstance(value, list):
        return any(map(has_rounded, value))
    return isinstance(value, float) and abs(value) >= 2.0**63


def _names_a_type(part: str | int) -> bool:
    """Pydantic names the member of a union that it tried."""
    return isinstance(part, str) and (part == "str" or "[" in part)


_ESCAPES = re.compile(
    rb"\\(?:\\|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)


def _with_whole_characters(raw: bytes) -> bytes:
    """The JSON text with U+FFFD for each half of a character, which JavaScript programs send."""
    return _ESCAPES.sub(lambda match: rb"\ufffd" if match[1] else match[0], raw)


def positive(value: int | None, field: str) -> int | None:
    """The value, or Refusal if it is no count of tokens."""
    if value is not None and value < 1:
        raise Refusal(f"{field}: must be 1 or more, got {value}", field=field)
    return value


# ---------------------------------------------------------------------- texts, tools, messages


class ImageUrl(Lenient):
    """What chat completions have in an `image_url`."""

    url: str = ""


class TextPart(Lenient):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | ImageUrl | None = None


_TEXTS = frozenset({"text", "input_text", "output_text", "refusal"})


def text_content(content: str | Sequence[TextPart] | None, place: str) -> str:
    """The text of a content. Raises Refusal, by name, for an image, a file or anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in _TEXTS:
            raise unsupported(f"a part of type {part.type!r}; only text is read here", place)
    return "".join(part.text or part.refusal or "" for part in content)


def content_with_images(content: str | Sequence[TextPart] | None, place: str) -> Any:
    """A content as messages have it: a text, or parts if there are images. Raises Refusal."""
    if content is None or isinstance(content, str):
        return content or ""
    return joined_parts([_given_part(part, place) for part in content])


def _given_part(part: TextPart, place: str) -> dict[str, Any]:
    if part.type in _TEXTS:
        return text_part(part.text or part.refusal or "")
    if part.type not in ("image_url", "input_image"):
        what = f"a part of type {part.type!r}; text and images are read here"
        raise unsupported(what, place)
    url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
    if not url:
        raise unsupported("an image without a URL; send it as a data URL", place)
    return image_part(url, place)


def text_part(text: str) -> dict[str, Any]:
    """A part of a content."""
    return {"type": "text", "text": text}


def image_part(url: str, place: str) -> dict[str, Any]:
    """The part of an image by its data URL. Raises Refusal for another URL: none is followed."""
    if url[:5].lower() != "data:":
        raise unsupported(f"{url[:60]!r} is not followed; send the image as a data URL", place)
    return {"type": "image", "image": url}


def joined_parts(parts: Sequence[dict[str, Any]]) -> Any:
    """The parts, or their text if there is no image among them."""
    if any(part["type"] == "image" for part in parts):
        return [part for part in parts if part["type"] == "image" or part["text"]]
    return "".join(part["text"] for part in parts)


def function_schema(
    name: object, description: object, parameters: object, place: str, **more: Any
) -> Schema:
    """A tool as chat templates know it. Raises Refusal if it has no name or its schema is none."""
    if not isinstance(name, str) or not name:
        raise Refusal(f"{place}.name: a tool needs a name", field=place)
    if not isinstance(parameters, (Mapping, type(None))):
        raise Refusal(f"{place}.parameters: must be a JSON schema", field=place)
    given = {"name": name, "description": description, "parameters": parameters, **more}
    kept = {key: value for key, value in given.items() if value is not None}
    return {"type": "function", "function": kept}


def text_tool(name: object, description: object, place: str) -> Schema:
    """A tool whose arguments are one text, as a function with the argument `input`."""
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
    }
    return function_schema(name, description, parameters, place)


def call_entry(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """One of a message's `tool_calls`."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def text_call(call_id: str, name: str, text: str) -> dict[str, Any]:
    """A call of a `text_tool`."""
    return call_entry(call_id, name, orjson.dumps({"input": text}).decode())


def strict_json(value: object) -> str:
    """What a client sent as JSON, as JSON. Raises Refusal if it has none: 1e999 is infinite."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise Refusal(
            f"the body has a value that JSON has not: {error}", code="invalid_json"
        ) from error


def given_assistant(
    content: str, calls: Sequence[dict[str, Any]], reasoning: str | None
) -> Message:
    """An assistant message as a client sends it."""
    message: Message = {"role": "assistant", "content": content, "raw": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages as templates take them. Raises Refusal if nobody has said anything.

    The system messages at the beginning become one; a later one becomes a user's, because templates
    refuse it there. A tool message gets the name of the tool that it answers for.
    """
    if not messages:
        raise Refusal("messages: there are none", field="messages")
    start = next(
        (place for place, one in enumerate(messages) if one["role"] != "system"), len(messages)
    )
    rest = [{**one, "role": "user"} if one["role"] == "system" else one for one in messages[start:]]
    texts = [one["content"] for one in messages[:start] if one["content"]]
    head: list[Message] = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    names: dict[str, str] = {}
    for message in rest:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and (name := names.get(message.get("tool_call_id", ""))):
            message["name"] = name
    if not rest:
        raise Refusal("messages: only system messages, nothing to answer", field="messages")
    return head + rest
