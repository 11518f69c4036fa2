"""What a template puts between a complete assistant turn and the next, for one kind of messages.

For most templates the text after an assistant turn's end token depends on the new messages alone,
not on the history. So it can be rendered after a fixed short conversation (the *stub*) and cut off
there: the *delta*, at a cost that does not grow with the conversation. A probe at load proves this
against whole conversations, in text and in ids; what cannot be proven is refused by name.

A delta is scaffold + block + generation prompt:
"\\n" + "<|im_start|>user ... <|im_end|>\\n" + "<|im_start|>assistant\\n".

The end token. Most templates end a turn with a token of its own. Three kinds do not:
- The next role's token ends the turn and opens the next block (GLM: `<|observation|>`, Gemma-4's
  tool calls). The model samples it, so it is the turn's (mask 1), and the delta starts after it.
- The last turn is left open, and closed when another message follows. The end token is what closes
  it.
- The last turn ends with another token than it has in history (gpt-oss: `<|return|>`, then
  `<|end|>`). The engine stops at the first; it stays, as every sampled token does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.template.probing import (
    CALL_MARK,
    CONTENT_MARK,
    OTHER_TOOL,
    PROBE_TOOL,
    answers,
    probe_call,
    renders,
    user,
)
from conversations.template.renderer import Renderer, Schema
from conversations.tokens import TEMPLATE, TOOL, USER, Piece


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens to append after a complete assistant turn, by author; `len()` counts them."""

    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.pieces)

    def ids(self) -> list[int]:
        """All of its tokens, in order."""
        return [token for _, ids in self.pieces for token in ids]


@dataclass(frozen=True, slots=True)
class End:
    """The token that ends a turn. `in_history` stands in its place once the conversation goes on.

    `opens_next`: it is the first token of what follows, so it ends turns of this kind alone.
    `is_open`: the template leaves it out after the last turn.
    """

    token: int
    text: str
    in_history: str
    opens_next: bool = False
    is_open: bool = False


class Deltas:
    """The deltas of one kind, "tool" or "user". Raises TemplateError if the template has none.

    `encoding` gives a text's ids and offsets in one go, `encode` its ids. `likely_end` is the
    end of other turns.
    """

    def __init__(
        self,
        kind: str,
        renderer: Renderer,
        encode: Callable[[str], list[int]],
        encoding: Callable[[str], Any],
        likely_end: End | None = None,
    ) -> None:
        self.kind = kind
        self._renderer = renderer
        self._encode = encode
        self._encoding = encoding
        self._tools: list[Schema] = [PROBE_TOOL] if kind == TOOL else []
        self._one_call = False
        self._shows_calls = True
        self._keeps_order = True
        self._frame: _Frame | None = None
        self._prepare()
        self.end = self._find_end(likely_end)
        self._scaffold, self.generation = self._find_edges()
        self.scaffold_ids = self.after_end(self._scaffold) if self._scaffold else []
        self.generation_ids = self._encode(self.generation) if self.generation else []

    # ------------------------------------------------------------------ a delta

    def delta(self, messages: Sequence[Message], turn: Message | None) -> Delta:
        """All of a turn's `messages` together. `turn` is the assistant message that they answer."""
        return self._delta(self._text(messages, turn))

    def _delta(self, text: str) -> Delta:
        """The delta with this text."""
        ids = self.after_end(text)
        head, tail = self.scaffold_ids, self.generation_ids
        stop = len(ids) - len(tail)
        if ids[: len(head)] == head and ids[stop:] == tail and len(head) <= stop:
            parts = [ids[: len(head)], ids[len(head) : stop], ids[stop:]]
        else:  # a token spans an edge: it goes to the block
            parts = self._parts_by_offset(text)
        authors = (TEMPLATE, self.kind, TEMPLATE)
        return Delta(tuple((name, part) for name, part in zip(authors, parts, strict=True) if part))

    def _text(self, messages: Sequence[Message], turn: Message | None = None) -> str:
        contents = [message["content"] for message in messages]
        if self._frame and all(isinstance(content, str) for content in contents):
            return self._frame.around(contents)
        return self.rendered(messages, turn)

    def rendered(
        self, messages: Sequence[Message], turn: Message | None = None, *, generation: bool = True
    ) -> str:
        """The text of a delta, rendered after the stub. `turn` is what the messages answer."""
        stub = self._stub(_answers(messages), turn)
        text = self._renderer.stub([*stub, *messages], self._tools, generation=generation)
        return self._behind_end(text)

    def _stub(self, messages: Sequence[Message], turn: Message | None = None) -> list[Message]:
        """The short conversation before `messages`: its calls are those that they answer."""
        if self.kind == USER:
            return [user("u"), {"role": "assistant", "content": CONTENT_MARK}]
        answered = (turn or {}).get("tool_calls") or _calls_for(messages)
        calls = [_with_arguments(one, '{"x": "a"}') for one in answered]
        calls[-1] = _with_arguments(calls[-1], f'{{"x": "{CALL_MARK}"}}')
        kept = calls[-1:] if self._one_call else calls
        content = "" if self._shows_calls else CONTENT_MARK
        return [user("u"), {"role": "assistant", "content": content, "tool_calls": kept}]

    def _behind_mark(self, text: str) -> int:
        """Where the stub's marked turn ends, but for what closes it."""
        mark = CALL_MARK if self.kind == TOOL and self._shows_calls else CONTENT_MARK
        place = text.find(mark)
        if place < 0:
            raise TemplateError(
                f"the chat template of {self._renderer.name} renders no text of an assistant turn"
                f"{' before tool messages' * (self.kind == TOOL)}"
            )
        return place + len(mark)

    def _behind_end(self, text: str) -> str:
        """What follows the end token of the stub's assistant turn."""
        end = text.find(self.end.in_history, self._behind_mark(text))
        if end < 0:
            raise TemplateError(
                f"the chat template of {self._renderer.name} does not end an assistant turn with "
                f"{self.end.in_history} before {self.kind} messages"
            )
        return text[end + len(self.end.in_history) :]

    def after_end(self, text: str) -> list[int]:
        """Ids of text that follows an end token: some tokenizers treat the start of a text
        differently.
        """
        ids = self._encode(self.end.text + text)
        if not ids or ids[0] != self.end.token:
            raise self._merges(self.end.text)
        return ids[1:]

    def _merges(self, token: str) -> TemplateError:
        return TemplateError(
            f"{self._renderer.name}: the end token {token!r} merges with the text after it"
        )

    def _parts_by_offset(self, text: str) -> list[list[int]]:
        shift = len(self.end.text)
        encoding = self._encoding(self.end.text + text)
        spans = encoding.offsets[1:]
        head = sum(1 for _, end in spans if end <= shift + len(self._scaffold))
        tail = sum(1 for start, _ in spans if start >= shift + len(text) - len(self.generation))
        return split_at(list(encoding.ids[1:]), [head, len(spans) - tail])

    # ------------------------------------------------------------------ what stands around every
    # block

    def _prepare(self) -> None:
        """Finds a stub that the template renders: with tools or without, with two calls or with
        one.
        """
        render = self._renderer.whole
        two = self._probe(["1", "2"])
        if self.kind == USER:
            if not renders(self._renderer, self._stub(two), []):
                self._tools = [PROBE_TOOL]
            return
        self._one_call = not self._renders_last_call(two)
        asked, turn = self._stub(two)
        text = render([asked, {**turn, "content": CONTENT_MARK}], self._tools, generation=False)
        self._shows_calls = CALL_MARK in text
        self._keeps_order = text.find(CONTENT_MARK) < text.find(CALL_MARK) or not self._shows_calls

    def _renders_last_call(self, messages: Sequence[Message]) -> bool:
        try:
            conversation = [*self._stub(messages), *messages]
            return CALL_MARK in self._renderer.whole(conversation, self._tools, generation=False)
        except TemplateError:
            return False

    def _probe(self, contents: Sequence[str], number: int = 0) -> list[Message]:
        """Messages of this kind, answering calls that no two probes share."""
        if self.kind == USER:
            return [user(content) for content in contents]
        calls = [
            probe_call(f"f{number}{index}", f"call_{number}_{index}", {})
            for index in range(1 if self._one_call else len(contents))
        ]
        return answers(calls, contents)

    def _alone_and_whole(self, contents: Sequence[str]) -> tuple[str, str]:
        """The stub, and the stub continued."""
        messages = self._probe(contents)
        stub = self._stub(messages)
        whole = self._renderer.whole
        return (
            whole(stub, self._tools, generation=False),
            whole([*stub, *messages], self._tools, generation=True),
        )

    def _find_end(self, likely: End | None) -> End:
        alone, whole = self._alone_and_whole([_CONTENT])
        if _CONTENT not in whole:
            raise TemplateError(
                f"the chat template of {self._renderer.name} does not render {self.kind} messages"
            )
        last = alone[self._behind_mark(alone) :]
        going_on = whole[self._behind_mark(whole) :].partition(_CONTENT)[0]
        return (
            self._closing_end(last, going_on, likely)
            or self._rewritten_end(last, going_on)
            or self._next_roles_end(last, going_on, likely)
            or self._refuse_end(going_on)
        )

    def _closing_end(self, last: str, going_on: str, likely: End | None) -> End | None:
        """A token that closes the turn, also in history, and stands nowhere within a turn."""
        tokens = [match.group() for match in self._renderer.specials(last)][::-1]
        eos, bos = self._renderer.tokenizer.eos_token, self._renderer.tokenizer.bos_token
        body = self._turn_body()
        first = likely.text if likely else eos
        is_open = not tokens if likely is None else likely.is_open
        for token in (first, eos, *tokens):
            if not token or token == bos or token in body or token not in going_on:
                continue
            if token in tokens or is_open:
                is_open = token not in tokens
                return End(self._renderer.token_id(token), token, token, is_open=is_open)
        return None

    def _turn_body(self) -> str:
        """The stub's assistant turn up to its mark, with two calls if the template renders two."""
        stub = self._stub(self._probe(["1", "2"]))
        alone = self._renderer.whole(stub, self._tools, generation=False)
        asked = self._renderer.whole(stub[:1], self._tools, generation=False)
        start = self._renderer.common_length(asked, alone)
        return alone[start : self._behind_mark(alone)]

    def _rewritten_end(self, last: str, going_on: str) -> End | None:
        """Another token stands in history where the last turn has its end."""
        start = self._renderer.common_length(last, going_on)
        ends, others = (self._renderer.specials(text[start:])[:1] for text in (last, going_on))
        if not ends or not others or ends[0].start() or others[0].start():
            return None
        token = ends[0].group()
        if others[0].group().startswith(token):
            raise self._merges(token)
        if last[start + len(token) :].strip():
            return None
        return End(self._renderer.token_id(token), token, others[0].group())

    def _next_roles_end(self, last: str, going_on: str, likely: End | None) -> End | None:
        """The turn is open at its end: the first token of what follows ends it."""
        closers = last.rstrip()
        if closers and (self.kind == USER or likely is None):  # ordinary text, which ends nothing
            return None
        rest = going_on[len(closers) :]
        tokens = self._renderer.specials(rest)[:1]
        if not going_on.startswith(closers) or not tokens or rest[: tokens[0].start()].strip():
            return None
        token = tokens[0].group()
        return End(self._renderer.token_id(token), token, token, opens_next=True, is_open=True)

    def _refuse_end(self, going_on: str) -> End:
        raise TemplateError(
            f"the chat template of {self._renderer.name} ends an assistant turn with "
            f"{going_on[:40]!r}, not with a special token: no engine can stop there"
        )

    def _find_edges(self) -> tuple[str, str]:
        """Scaffold and generation prompt: the same whatever the messages are."""
        messages = self._probe([_CONTENT])
        stub = self._stub(messages)
        whole, common = self._renderer.whole, self._renderer.common_length
        alone = whole(stub, self._tools, generation=False)
        quiet = whole([*stub, *messages], self._tools, generation=False)
        asked = whole([*stub, *messages], self._tools, generation=True)
        kept = common(quiet, asked)
        if _CONTENT not in asked[:kept]:
            raise TemplateError(
                f"the chat template of {self._renderer.name} rewrites the prompt when "
                "add_generation_prompt is set"
            )
        scaffold = ""
        if not (self.end.opens_next or self.end.is_open) and self.end.text == self.end.in_history:
            after, text = self._behind_end(alone), self._behind_end(asked)
            scaffold = after[: common(after, text)]
        return scaffold, asked[kept:]

    # ------------------------------------------------------------------ the proof

    def prove(self, with_tools: bool) -> str:
        """Empty if deltas equal what whole conversations have at that place, in text and in ids.

        Else what differs. `with_tools`: conversations in which tools are offered.
        """
        offers = [[PROBE_TOOL], [PROBE_TOOL, OTHER_TOOL]] if with_tools else [[]]
        proven = 0
        for tools in offers:
            for contents in (["42"], ["  two\n\n", "", "{'x': [1]}\n"]):
                messages = self._probe(contents if self.kind == TOOL else contents[:1], number=7)
                for history in self.histories(messages):
                    if not renders(self._renderer, history, tools):
                        continue
                    proven += 1
                    if difference := self._difference(history, messages, tools):
                        return difference
        return "" if proven else "it refuses every conversation that was tried"

    def prove_images(self, with_tools: bool, placeholder: int) -> str:
        """`prove` for messages with images; `placeholder` is the token that stands for one."""
        messages = self._probe(["a", "b"] if self.kind == TOOL else ["a"], number=7)
        contents: list[list[dict[str, Any]]] = [[IMAGE, _said("a")], [IMAGE, IMAGE, _said("b")]]
        if self.kind == USER:
            contents = [[_said("a\n"), IMAGE, _said(" b"), IMAGE]]
        shown = [{**one, "content": new} for one, new in zip(messages, contents, strict=False)]
        tools = [PROBE_TOOL] if with_tools else []
        proven = 0
        for history in self.histories(shown):
            asked = [_with_image(message) for message in history]
            if not renders(self._renderer, asked, tools):
                continue
            proven += 1
            if difference := self._difference(asked, shown, tools):
                return difference
            delta = self.delta(shown, asked[-1])
            found = sum(ids.count(placeholder) for _, ids in delta.pieces)
            expected = sum(part is IMAGE for content in contents for part in content)
            if found != expected:
                return f"it renders {found} placeholders for {expected} images"
        return "" if proven else "it refuses every conversation that was tried"

    def histories(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Conversations that a delta continues: short, long, with tool rounds, with thoughts.

        Their calls differ from the stub's in arguments, and in all of earlier rounds.
        """
        ask = user("Question?")
        answer: Message = {"role": "assistant", "content": "Answer."}
        earlier = probe_call("other", "call_0_0", {"y": 1})
        round_trip: list[Message] = [
            {"role": "assistant", "content": "Let me see.", "tool_calls": [earlier]},
            *answers([earlier], ["1"]),
        ]
        last = answer if self.kind == USER else self._last_turn(messages)
        thought = {**last, "content": "<think>\nhm\n</think>\n\nSo."}
        reasoned = {**last, "reasoning_content": "hm"}
        silent: list[list[Message]] = (
            []
            if self.kind == USER
            else [
                [ask, {**last, "content": ""}],
                [ask, *round_trip, {**reasoned, "content": ""}],
            ]
        )
        if not self._keeps_order:  # text before calls is text after them to this template
            return [*silent, [ask, *round_trip, *round_trip, silent[0][-1]]]
        return [
            [ask, last],
            [{"role": "system", "content": "Rules."}, ask, answer, ask, last],
            [ask, *round_trip, *round_trip, last],
            [ask, thought],
            [ask, reasoned],
            *silent,
        ]

    def _last_turn(self, messages: Sequence[Message]) -> Message:
        calls = [_with_arguments(one, '{"y": 1}') for one in _calls_for(messages)]
        return {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": calls[-1:] if self._one_call else calls,
        }

    def _difference(
        self, history: list[Message], messages: list[Message], tools: list[Schema]
    ) -> str:
        text = self._text(messages, history[-1])
        return self.difference(history, messages, tools, text, self._delta(text))

    def difference(
        self,
        history: Sequence[Message],
        messages: Sequence[Message],
        tools: Sequence[Schema],
        text: str,
        delta: Delta,
    ) -> str:
        """How a delta and its text differ from what a whole conversation has; empty if they are it.

        Raises TemplateError if the template refuses the conversation.
        """
        whole = self._renderer.whole([*history, *messages], tools, generation=True)
        if not whole.endswith(self.end.in_history + text):
            offered = " with tools" if tools else ""
            return f"after {len(history)} messages{offered} it renders other text than after two"
        before = whole[: len(whole) - len(text)]
        if list(self._encoding(whole).ids) != list(self._encoding(before).ids) + delta.ids():
            return "its tokens merge across the end of a turn"
        return ""

    def find_frame(self) -> None:
        """Looks for the constant text around contents: if there is one, rendering is joining."""
        first, second = "frame1", "frame2"
        try:
            head, _, tail = self.rendered(self._probe([first])).partition(first)
            two = self.rendered(self._probe([first, second]))
            between = two.partition(first)[2].partition(second)[0]
            frame = _Frame(head, between, tail)
            for content in _ODD_CONTENTS:
                for count in (1, 2, 3):
                    contents = [content] * count
                    if self.rendered(self._probe(contents, count)) != frame.around(contents):
                        return
        except TemplateError:  # rendering what it refuses will say so
            return
        self._frame = frame


_CONTENT = "x1y2z"

IMAGE: dict[str, Any] = {"type": "image", "image": ""}


def _said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _with_image(message: Message) -> Message:
    """A user's message with an image before its text; any other as it is."""
    if message["role"] != USER:
        return message
    return {**message, "content": [IMAGE, _said(message["content"])]}


@dataclass(frozen=True, slots=True)
class _Frame:
    head: str
    between: str
    tail: str

    def around(self, contents: Sequence[str]) -> str:
        return f"{self.head}{self.between.join(contents)}{self.tail}"


_ODD_CONTENTS = (
    "", " ", "\n", "  x\n\n", "x y", "<b>&amp;'\"", '{"a": [1, null]}', "[1]", "None", "0", "-1.5",
    "true", "Error: x", "é\u2028漢🙂", "<think>\nx\n</think>\n\ny", "</think>", "<tool_call>",
    "<tool_response>x</tool_response>", "<|im_end|>", "{{ x }}", "a" * 3000,
)  # fmt: skip
"""What a template may treat specially: blanks, markup, JSON, thoughts, control tokens, length."""


def _answers(messages: Sequence[Message]) -> Sequence[Message]:
    """The tool messages at the beginning: they answer the turn."""
    end = next((k for k, message in enumerate(messages) if message["role"] != TOOL), len(messages))
    return messages[:end]


def _calls_for(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The calls that tool messages answer, in order."""
    names = {
        message.get("tool_call_id") or f"call_0_{index}": message.get("name") or "f"
        for index, message in enumerate(messages)
    }
    return [probe_call(name, call_id, {}) for call_id, name in names.items()]


def _with_arguments(one: dict[str, Any], arguments: str) -> dict[str, Any]:
    return {**one, "function": {"name": one["function"]["name"], "arguments": arguments}}


def split_at(ids: list[int], cuts: Sequence[int]) -> list[list[int]]:
    """The ids cut at these places."""
    bounds = [0, *cuts, len(ids)]
    return [ids[start:end] for start, end in pairwise(bounds)]
