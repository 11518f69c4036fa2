"""Chat messages in the OpenAI schema, and the two things a model's tool call can be.

A message is a plain dict, as it stands in task files and records. A sampled assistant message
carries `raw`, the exact text of its sampled ids; a given one has `raw: None`. A call that could not
be parsed keeps its text verbatim.

`content` is a text, or a list of parts if there are images among them: `{"type": "text", "text":
...}` and `{"type": "image", "image": ...}`. The image is the reference `sha256:HEX` of a file in
the run's `images/`; in a task whose images were not read yet, the number of its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.errors import ImageError, MessageError
from conversations.images.sources import ImageSource, image_source

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


def tool_message(
    text: str, *, call_id: str | None, name: str | None, images: Sequence[str] = ()
) -> Message:
    """The message that answers one call. `call_id` is None for what a tool said when it was
    created.

    `images` are references; they stand before the text, as in verl 0.6.1.
    """
    message: Message = {"role": "tool", "content": content_of(text, images)}
    if call_id is not None:
        message["tool_call_id"] = call_id
    if name:
        message["name"] = name
    return message


def content_of(text: str, images: Sequence[str] = ()) -> Any:
    """A message's content of images, by reference, and a text after them."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [*parts, {"type": "text", "text": text}] if text else parts


def content_text(content: Any, mark: str = "<image>") -> str:
    """The text of a content; `mark` stands for each image. Empty for None."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] if part.get("type") == "text" else mark for part in content)


def image_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The image parts of messages, in order."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if part.get("type") == "image")


def with_images(messages: Sequence[Message], references: Sequence[str]) -> list[Message]:
    """The messages with the k-th reference in the k-th image part; the given ones stay as they
    are.
    """
    rest = iter(references)

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "image": next(rest)} if one["type"] == "image" else one

    return [
        {**message, "content": [part(one) for one in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


@dataclass(slots=True)
class GivenImages:
    """The images of a task while its messages are read: `sources` in the order of their parts.

    `column` is the row's `images` as verl has it: the text `<image>` and parts without an image of
    their own take the next of it. None: there is no such column, and `<image>` is text. Relative
    paths are in `folder`.
    """

    column: Sequence[Any] | None = None
    folder: Path | None = None
    sources: list[ImageSource] = field(default_factory=list)
    _taken: int = 0

    def take(self, given: object = None) -> dict[str, Any]:
        """The part of an image, of the column's next if none is given. Raises ImageError."""
        if given is None:
            column = self.column or ()
            if self._taken >= len(column):
                raise ImageError(f"there are more <image> placeholders than images ({len(column)})")
            given = column[self._taken]
            self._taken += 1
        self.sources.append(image_source(given, self.folder))
        return {"type": "image", "image": len(self.sources) - 1}

    def check_used(self) -> None:
        """Raises ImageError if images of the column stand nowhere."""
        if self.column is not None and self._taken < len(self.column):
            raise ImageError(
                f"the row has {len(self.column)} images, but its messages hold {self._taken} "
                "<image> placeholders"
            )


def given_messages(messages: object, images: GivenImages | None = None) -> list[Message]:
    """Checks a task's messages and returns them as the record keeps them.

    Text parts (`[{"type": "text", "text": ...}]`) become one string, an assistant's missing content
    the empty string, and given assistant messages get `raw: None`. Image parts are `image` and
    OpenAI's `image_url`; their sources go to `images`, without which they are refused. Raises
    MessageError on anything that is not in the OpenAI chat schema.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise MessageError(
            "messages must be a non-empty list of {role, content} objects, "
            f"got {_shape(messages)}"
        )
    given = [_given(message, index, images) for index, message in enumerate(messages)]
    if images:
        try:
            images.check_used()
        except ImageError as error:
            raise MessageError(str(error)) from error
    return given


def _given(message: object, index: int, images: GivenImages | None) -> Message:
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
    kept["content"] = _content(kept.get("content", ""), index, images)
    if role == "assistant" and isinstance(kept["content"], list):
        raise MessageError(f"message {index} (assistant) holds an image; models write text")
    if "tool_calls" in kept:
        kept["tool_calls"] = _given_calls(kept["tool_calls"], index)
    if role == "assistant":
        kept["raw"] = None
    return kept


_PLACEHOLDER = re.compile(r"(<image>)")


def _content(content: object, index: int, images: GivenImages | None) -> Any:
    """A text if there are only texts, else a list of parts, no two texts beside each other."""
    has_column = images is not None and images.column is not None
    if isinstance(content, str) and not (has_column and "<image>" in content):
        return content
    parts: list[dict[str, Any]] = []
    try:
        for part in _parts(content, images):
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                part = {"type": "text", "text": parts.pop()["text"] + part["text"]}
            parts.append(part)
    except (ImageError, TypeError) as error:
        raise MessageError(f"message {index} has content of {_shape(content)}; {error}") from error
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _parts(content: object, images: GivenImages | None) -> Iterator[dict[str, Any]]:
    """The parts of a content. Raises ImageError, and TypeError for what is neither text nor
    image.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise TypeError("only text (a string or parts) and images are supported")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from _text_parts(part["text"], images)
        elif kind in ("image", "image_url", "input_image"):
            if images is None:
                raise ImageError("images are not taken here; only text")
            yield images.take(part.get("image") or part.get("image_url"))
        else:
            raise TypeError("only text (a string or text parts) and images are supported")


def _text_parts(text: str, images: GivenImages | None) -> Iterator[dict[str, Any]]:
    if images is None or images.column is None:
        yield {"type": "text", "text": text}
        return
    for piece in _PLACEHOLDER.split(text):
        if piece == "<image>":
            yield images.take()
        elif piece:
            yield {"type": "text", "text": piece}


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
