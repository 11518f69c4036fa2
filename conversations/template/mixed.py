"""Deltas for messages of several authors after one turn: tools and a user, or a client's own turns.

A foreign agent may answer a turn with tool results and a user message, with two user messages, or
with an assistant message that it wrote itself and the results of that one's calls. Such a delta is
rendered after the stub like any other. It is used only for neighbours that were proven: the probe
renders conversations with each pair of roles, and compares text and ids with the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.template.deltas import Delta, Deltas, split_at
from conversations.template.probing import (
    OTHER_TOOL,
    PROBE_TOOL,
    answers,
    probe_call,
    renders,
    user,
)
from conversations.template.renderer import Renderer
from conversations.tokens import TEMPLATE, TOOL, USER

ASSISTANT = "assistant"
Pair = tuple[str, str]
"""The roles of two messages, one after the other."""


class MixedDeltas:
    """The deltas of one template whose messages have several roles.

    `first` are the proven deltas of the first message's kind: "tool" or "user".
    """

    def __init__(
        self,
        first: Deltas,
        renderer: Renderer,
        encode: Callable[[str], list[int]],
        encoding: Callable[[str], Any],
    ) -> None:
        self._first = first
        self._renderer = renderer
        self._encode = encode
        self._encoding = encoding

    def delta(
        self, messages: Sequence[Message], turn: Message | None, *, with_tools: bool
    ) -> Delta:
        """What stands between a turn and the next. Raises TemplateError if it is not proven."""
        unproven = roles(messages) - self.proven(with_tools)
        if unproven:
            pairs = ", ".join(sorted(f"{one} {other}" for one, other in unproven))
            raise TemplateError(
                f"the chat template of {self._renderer.name} cannot be continued turn by turn with "
                f"messages of these roles one after the other: {pairs}"
            )
        return self._delta(messages, turn)

    def _delta(self, messages: Sequence[Message], turn: Message | None) -> Delta:
        first = self._first
        text = first.rendered(messages, turn)
        runs = [(author, list(run)) for author, run in groupby(messages, _author)]
        cuts = [*self._run_ends(text, [run for _, run in runs], turn), len(text)]
        parts = self._encoded(text, cuts)
        head, tail = first.scaffold_ids, first.generation_ids
        if parts[0][: len(head)] != head or parts[-1][len(parts[-1]) - len(tail) :] != tail:
            raise TemplateError("a token spans the edge of a block")
        opening, parts[0] = parts[0][: len(head)], parts[0][len(head) :]
        parts[-1], closing = split_at(parts[-1], [len(parts[-1]) - len(tail)])
        authors = [TEMPLATE, *(author for author, _ in runs), TEMPLATE]
        pieces = zip(authors, [opening, *parts, closing], strict=True)
        return Delta(tuple((author, ids) for author, ids in pieces if ids))

    def _run_ends(
        self, text: str, runs: Sequence[Sequence[Message]], turn: Message | None
    ) -> list[int]:
        """Where each author's messages end in the text, but for the last one's."""
        ends, messages = [], list(runs[0])
        for run in runs[1:]:
            before = self._first.rendered(messages, turn, generation=False)
            ends.append(self._renderer.common_length(before, text))
            messages += run
        return ends

    def _encoded(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """The ids of the text up to each cut. A control token at a cut keeps both sides apart."""
        starts = {match.start() for match in self._renderer.specials(text)}
        if all(cut in starts for cut in cuts[:-1]):
            head, *others = [text[start:end] for start, end in pairwise([0, *cuts])]
            return [self._first.after_end(head), *map(self._encode, others)]
        shift = len(self._first.end.text)
        encoding = self._encoding(self._first.end.text + text)
        spans = encoding.offsets[1:]
        places = [sum(1 for start, _ in spans if start < shift + cut) for cut in cuts[:-1]]
        return split_at(list(encoding.ids[1:]), places)

    # ------------------------------------------------------------------ the proof

    def proven(self, with_tools: bool) -> frozenset[Pair]:
        """The pairs of roles that are exact in every probe. Probed when it is first asked for."""
        return self._with_tools if with_tools else self._without_tools

    @functools.cached_property
    def _with_tools(self) -> frozenset[Pair]:
        return self._proven(True)

    @functools.cached_property
    def _without_tools(self) -> frozenset[Pair]:
        return self._proven(False)

    def _proven(self, with_tools: bool) -> frozenset[Pair]:
        probes = _TOOL_PROBES if self._first.kind == TOOL else _USER_PROBES
        exact = {(TOOL, TOOL)} if self._first.kind == TOOL else set()
        wrong: set[Pair] = set()
        for messages in probes:
            if (is_exact := self._is_exact(messages, with_tools)) is not None:
                (exact if is_exact else wrong).update(roles(messages))
        return frozenset(exact - wrong)

    def _is_exact(self, messages: list[Message], with_tools: bool) -> bool | None:
        """Whether the delta equals what whole conversations have; None if all are refused."""
        tools = [PROBE_TOOL, OTHER_TOOL] if with_tools else []
        histories = [
            history
            for history in self._first.histories(_first_run(messages))
            if renders(self._renderer, [*history, *messages], tools)
        ]
        try:
            differences = [
                self._first.difference(
                    history,
                    messages,
                    tools,
                    self._first.rendered(messages, history[-1]),
                    self._delta(messages, history[-1]),
                )
                for history in histories
            ]
        except TemplateError:
            return False
        return not any(differences) if histories else None


def roles(messages: Sequence[Message]) -> set[Pair]:
    """The roles that stand one after the other."""
    return {(one["role"], other["role"]) for one, other in pairwise(messages)}


def _author(message: Message) -> str:
    """Who wrote it: a tool, or whoever speaks for the user."""
    return TOOL if message["role"] == TOOL else USER


def _first_run(messages: Sequence[Message]) -> list[Message]:
    role = messages[0]["role"]
    end = next((k for k, each in enumerate(messages) if each["role"] != role), len(messages))
    return list(messages[:end])


def _written_call(number: int) -> tuple[Message, Message]:
    """A client's assistant message with a call, and its answer."""
    one = probe_call("other", f"call_9_{number}", {"y": number})
    turn: Message = {"role": ASSISTANT, "content": "I looked.", "tool_calls": [one]}
    return turn, answers([one], [f"{number}"])[0]


def _probes(first: list[Message]) -> list[list[Message]]:
    said: Message = {"role": ASSISTANT, "content": "Said."}
    again = user("  and\n\nnow?")
    return [
        [*first, user("Go on.")],
        [*first, again, user("42")],
        [*first, *_written_call(1), *_written_call(2)],
        [*first, *_written_call(1), again],
        [*first, said, again],
        [*first, again, said, user("Sure?")],
        [*first, again, *_written_call(1)],
    ]


_CALLS = [probe_call("f7", "call_7_0", {}), probe_call("g7", "call_7_1", {})]
_TOOL_PROBES = [
    [*answers(_CALLS, [" x\n", ""]), user("ok?")],
    *_probes(answers(_CALLS[:1], ["42"])),
]
_USER_PROBES = _probes([user("Well?")])
