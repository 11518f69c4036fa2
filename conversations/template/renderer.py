"""Renders messages with a tokenizer's chat template: whole conversations, and stubs at less cost.

Whole conversations go through `apply_chat_template`, which is what a model was trained with. Stubs
are rendered many times, so the same template is compiled once for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.template.views import Dialect
from conversations.tokenizer import compile_template

Schema = dict[str, Any]
"""An OpenAI tool schema."""


class Renderer:
    """One tokenizer's chat template. `dialect` is how it wants messages, plain until a probe says
    more.

    A tokenizer with named templates uses `tool_use` if tools are offered, else `default`, as
    transformers does.
    """

    def __init__(self, name: str, tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs)
        self.dialect = Dialect()
        self._variables = {**tokenizer.special_tokens_map, **self.kwargs}
        self._special = {
            **{str(token): token_id for token, token_id in _added(tokenizer)},
            **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
        }
        by_length = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._compiled: dict[bool, Callable[..., str]] = {}

    def whole(
        self, messages: Sequence[Message], tools: Sequence[Schema], *, generation: bool
    ) -> str:
        """The text of a conversation. Raises TemplateError if the template refuses the messages."""
        try:
            text = self.tokenizer.apply_chat_template(
                self.dialect.view(messages),
                tools=list(tools) or None,
                add_generation_prompt=generation,
                tokenize=False,
                **self.kwargs,
            )
        except Exception as error:  # jinja2's, or any other that bad messages lead to
            raise TemplateError(
                f"the chat template of {self.name} refuses the messages: {_one_line(error)}"
            ) from error
        return str(text)

    def stub(
        self, messages: Sequence[Message], tools: Sequence[Schema], *, generation: bool = True
    ) -> str:
        """`whole`, without the set-up that each call of it costs."""
        render = self._template(bool(tools))
        try:
            return str(
                render(
                    messages=self.dialect.view(messages),
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._variables,
                )
            )
        except Exception as error:
            raise TemplateError(
                f"the chat template of {self.name} refuses {messages[-1]['role']} messages: "
                f"{_one_line(error)}"
            ) from error

    def compile(self) -> None:
        """Raises TemplateError if the template is not one that jinja2 can read."""
        self._template(True)

    def _template(self, with_tools: bool) -> Callable[..., str]:
        if with_tools not in self._compiled:
            tools: list[Schema] | None = [{}] if with_tools else None
            try:
                source = self.tokenizer.get_chat_template(tools=tools)
                self._compiled[with_tools] = compile_template(source).render
            except Exception as error:  # jinja2's, or the tokenizer's own
                raise TemplateError(
                    f"the chat template of {self.name} cannot be read: {_one_line(error)}"
                ) from error
        return self._compiled[with_tools]

    # ------------------------------------------------------------------ control tokens in a text

    def specials(self, text: str) -> list[re.Match[str]]:
        """The added and special tokens in a text, in order."""
        return list(self._pattern.finditer(text))

    def token_id(self, token: str) -> int:
        """The id of a token that `specials` gave."""
        return int(self._special[token])

    def common_length(self, first: str, second: str) -> int:
        """How many characters two texts share at their beginning, no control token cut in two."""
        length = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        for text in (first, second):
            for token in self._pattern.finditer(text, max(0, length - 100)):
                if token.start() < length < token.end():
                    length = token.start()
        return length


def _added(tokenizer: Any) -> list[tuple[str, int]]:
    return [(token.content, token_id) for token_id, token in tokenizer.added_tokens_decoder.items()]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
