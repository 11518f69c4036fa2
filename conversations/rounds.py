"""Who wrote which message: the task, a tool at its creation, the model, or whoever answered it.

The only place that decides it. A message is sampled if and only if its `raw` is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conversations.messages import Message, content_text
from conversations.tokens import TOOL, USER


def is_sampled(message: Mapping[str, Any]) -> bool:
    """Whether the model wrote the message in this conversation."""
    return message.get("role") == "assistant" and isinstance(message.get("raw"), str)


def text_said(message: Mapping[str, Any]) -> str:
    """What stands in the message: its `raw` text if it was sampled, else its content.

    An image is `<image>`, as in verl's data.
    """
    return str(message["raw"]) if is_sampled(message) else content_text(message["content"])


def sampled_places(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The indices of the sampled messages, one a turn."""
    return [place for place, message in enumerate(messages) if is_sampled(message)]


def first_sampled(messages: Sequence[Mapping[str, Any]]) -> int:
    """The index of the first sampled message, or the number of messages if none was sampled."""
    places = (place for place, message in enumerate(messages) if is_sampled(message))
    return next(places, len(messages))


def last_sampled(messages: Sequence[Mapping[str, Any]]) -> int:
    """The index of the last sampled message, or -1 if none was sampled."""
    return next(
        (place for place in reversed(range(len(messages))) if is_sampled(messages[place])), -1
    )


def given_length(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    segments: Sequence[Sequence[Any]],
    prompt_length: int,
) -> int:
    """How many messages are the task's own: those before what tools said at their creation.

    A task may end with a tool message of its own. Only the segments tell: what a tool said at its
    creation is a `tool` segment within the first `prompt_length` tokens. Each tool speaks at most
    once, in the order in which the tools are offered.
    """
    end = first_sampled(messages)
    if not any(kind == TOOL and start < prompt_length for kind, start, _ in segments):
        return end
    names = [tool["function"]["name"] for tool in tools]
    while end and (name := _creator(messages[end - 1])) in names:
        names = names[: names.index(name)]
        end -= 1
    return end


def _creator(message: Mapping[str, Any]) -> str | None:
    """The tool that may have said this at its creation."""
    is_answer = message["role"] != TOOL or "tool_call_id" in message
    return None if is_answer else message.get("name")


def kind_of(replies: Sequence[Mapping[str, Any]]) -> str:
    """Who answers first: "tool", also if nobody answers, or "user"."""
    return USER if replies and replies[0]["role"] != TOOL else TOOL


@dataclass(slots=True)
class Round:
    """A turn's message and the messages that follow it, up to the next turn."""

    message: Message
    replies: list[Message] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Who answered: the tools, or a user."""
        return kind_of(self.replies)


@dataclass(frozen=True, slots=True)
class Rounds:
    """`opening` are the task's messages and what tools said when they were created."""

    opening: list[Message]
    rounds: list[Round]


def split_rounds(messages: list[Message]) -> Rounds:
    """The messages by turn."""
    opening: list[Message] = []
    rounds: list[Round] = []
    for message in messages:
        if is_sampled(message):
            rounds.append(Round(message))
        else:
            (rounds[-1].replies if rounds else opening).append(message)
    return Rounds(opening, rounds)
