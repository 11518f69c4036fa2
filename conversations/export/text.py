"""Conversations as text, for formats that hold no token ids, and what a consumer makes of it.

The text is as close to the tokens as messages can be: an assistant's content is its `raw` with its
calls, and if a consumer gives no tools to its chat template, the tools stand in the system message,
word for word as they stood in the prompt's tokens.

Each text format has a `retokenised_...` function that does what its consumer's own code does (tests
compare the two). `verdict` says whether the consumer trains on the sampled ids and on nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conversations.rounds import last_sampled, text_said
from conversations.template import ChatTemplate

VERDICTS = {
    "same": "the consumer's tokens and mask are the record's",
    "scaffold": "the tokens are the record's; the consumer also trains on the template's scaffold "
    "after an end token (a newline)",
    "mask": "the tokens are the record's, but the consumer trains on some that the model did not "
    "sample, or not on some that it did",
    "tokens": "the consumer gets other tokens out of the text",
    "refused": "the consumer's code or the chat template refuses the messages; left out",
    "not checked": "the run has no tokenizer, or the record no token ids",
}
"""What a check can find, best first."""

REMEMBERED = 1024
"""The number of system messages with tools that are remembered."""

_MARK = "a4b1turntrace"

TokensAndMask = tuple[list[int], list[int]]
"""A consumer's token ids and mask: 1 where it trains the model on the token."""


class UnreadableMessagesError(Exception):
    """A consumer could not read the messages. It never leaves this package."""


class TextView:
    """Records' messages as text, by the chat template of their run."""

    def __init__(self, template: ChatTemplate | None, kwargs: Mapping[str, Any]) -> None:
        self.template = template
        self._kwargs = dict(kwargs)
        self._systems: dict[str, str] = {}
        self._defaults: dict[str, str] = {}

    def messages(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        """Role and content up to the last sampled message, an assistant's content as it was
        sampled.

        Tools stand in the system message.
        """
        spoken = record["messages"][: last_sampled(record["messages"]) + 1]
        return self._with_tools([_plain(message) for message in spoken], record)

    def default_system(self, tools: Sequence[Any]) -> str:
        """The system message that the template adds if none is given, "" if it adds none."""
        key = json.dumps(tools)
        if key not in self._defaults:
            self._defaults[key] = self._default_system(tools)
        return self._defaults[key]

    def _default_system(self, tools: Sequence[Any]) -> str:
        asked = [{"role": "user", "content": "u"}]
        if self.template is None:
            return ""
        try:
            plain = self.render(asked, generation=False, tools=tools)
            marked = self.render(
                [{"role": "system", "content": _MARK}, *asked], generation=False, tools=tools
            )
        except UnreadableMessagesError:
            return ""
        head, _, tail = marked.partition(_MARK)
        default = plain[len(head) : len(plain) - len(tail)]
        return default if f"{head}{default}{tail}" == plain else ""

    def prompt(self, record: Mapping[str, Any]) -> str:
        """The text of the prompt's ids. The run must have a tokenizer."""
        return self._decode(record["prompt_ids"])

    def completion(self, record: Mapping[str, Any]) -> str:
        """The text of the response's ids up to the last sampled one."""
        return self._decode(
            whole_ids(record)[len(record["prompt_ids"]) : record["turns"][-1]["end"]]
        )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generation: bool, tools: Sequence[Any] = ()
    ) -> str:
        """The chat template's text. Raises Refused."""
        assert self.template is not None
        try:
            return str(
                self.template.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **self._kwargs,
                )
            )
        except (
            Exception
        ) as error:  # templates raise through jinja2, and anything else through bad messages
            raise UnreadableMessagesError(str(error)) from error

    def _decode(self, ids: Sequence[int]) -> str:
        assert self.template is not None
        return self.template.decode(ids)

    def _with_tools(
        self, messages: list[dict[str, str]], record: Mapping[str, Any]
    ) -> list[dict[str, str]]:
        if not record["tools"] or not messages or self.template is None:
            return messages
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        rest = messages if system is None else messages[1:]
        key = json.dumps([system, record["tools"]])
        content = self._systems.get(key) or self._system_with_tools(
            messages[: len(messages) - len(rest)], rest, record
        )
        if content is None:
            return messages
        if len(self._systems) >= REMEMBERED:
            self._systems.clear()
        self._systems[key] = content
        return [{"role": "system", "content": content}, *rest]

    def _system_with_tools(
        self, system: list[dict[str, str]], rest: list[dict[str, str]], record: Mapping[str, Any]
    ) -> str | None:
        """The system message that renders to the prompt with its tools, None if there is no such
        message.
        """
        asked = rest[
            : next(
                (index for index, message in enumerate(rest) if message["role"] == "assistant"),
                len(rest),
            )
        ]
        try:
            prompt = self.prompt(record) or self.render(
                [*system, *asked], generation=True, tools=record["tools"]
            )
            head, _, tail = self.render(
                [{"role": "system", "content": _MARK}, *asked], generation=True
            ).partition(_MARK)
            content = prompt[len(head) : len(prompt) - len(tail)]
            found = self.render([{"role": "system", "content": content}, *asked], generation=True)
        except UnreadableMessagesError:
            return None
        return content if found == prompt else None


def whole_ids(record: Mapping[str, Any]) -> list[int]:
    """`prompt_ids + response_ids`."""
    ids: list[int] = record["prompt_ids"] + record["response_ids"]
    return ids


def whole_mask(record: Mapping[str, Any]) -> list[int]:
    """1 where the engine sampled the token, over `prompt_ids + response_ids`."""
    mask: list[int] = [0] * len(record["prompt_ids"]) + record["response_mask"]
    return mask


def after_common(prompt: list[int], whole: list[int]) -> TokensAndMask:
    """The tokens of a prompt with its completion. The mask is 1 after the prompt's own tokens."""
    common = next(
        (
            place
            for place, (one, other) in enumerate(zip(prompt, whole, strict=False))
            if one != other
        ),
        min(len(prompt), len(whole)),
    )
    return whole, [0] * common + [1] * (len(whole) - common)


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    return {"role": message["role"], "content": text_said(message)}


# ---------------------------------------------------------------------- what that means


def verdict(record: Mapping[str, Any], tokens: TokensAndMask, template: ChatTemplate) -> str:
    """One of `VERDICTS`: the consumer's tokens against the record's, to the last sampled one."""
    ids, mask = tokens
    end = record["turns"][-1]["end"]
    own = whole_ids(record)
    if ids[:end] != own[:end]:
        return "tokens"
    wanted = whole_mask(record)[:end] + [0] * (len(ids) - end)
    differing = [
        place for place, (one, other) in enumerate(zip(mask, wanted, strict=True)) if one != other
    ]
    if not differing:
        return "same"
    scaffold = _scaffold(record, template)
    return "scaffold" if all(mask[place] and scaffold(place) for place in differing) else "mask"


def _scaffold(record: Mapping[str, Any], template: ChatTemplate) -> Callable[[int], bool]:
    """Whether a place is scaffold that the template puts after an end token."""
    own, end = whole_ids(record), record["turns"][-1]["end"]
    places = {
        place
        for kind, start, stop in record["segments"]
        if kind == "template"
        for place in range(start, stop)
    }
    complete = own[end - 1] in template.end_ids
    return lambda place: (
        complete if place >= end else place in places and own[place] not in template.end_ids
    )
