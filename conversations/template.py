"""The chat template, turn by turn: what to append between two turns, without rendering the conversation again.

Theory of operation. For most templates the text after an assistant turn's end token depends on the new messages alone,
not on the history. So it can be rendered after a fixed three-line conversation (the *stub*) and cut off there: the
*delta*, at a cost that does not grow with the conversation. A probe at load proves this for the given tokenizer and
template, in text and in ids, against whole conversations rendered by `apply_chat_template`; what cannot be proven is
refused by name. Where a template rewrites *earlier* turns (Qwen3 drops old `<think>` blocks) the delta still holds:
the sampled tokens stay, and `rewrites_history` says so.

A delta is scaffold + block + generation prompt: "\\n" + "<|im_start|>user ... <|im_end|>\\n" + "<|im_start|>assistant\\n".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from conversations.encoding import SegmentEncoder, without_lone_surrogates
from conversations.errors import TemplateError
from conversations.formats import hermes
from conversations.formats.format import NO_TYPES, CallFormat, ParameterTypes
from conversations.messages import Message, ParsedTurn, template_view
from conversations.tokens import PROMPT, TEMPLATE, TOOL, USER

Piece = tuple[str, list[int]]
"""(kind, token ids): a run of tokens by one author."""

_MARK = "a4b1turntrace"
"""Stands in the stub's assistant turn; the delta starts after the first end token behind it."""

_CALL = {
    "id": "callstub0",
    "type": "function",
    "function": {"name": "f", "arguments": f'{{"x": "{_MARK}"}}'},
}
_STUBS: dict[str, list[Message]] = {
    TOOL: [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "tool_calls": [_CALL]},
    ],
    USER: [{"role": "user", "content": "u"}, {"role": "assistant", "content": _MARK}],
}
_STUB_VIEWS = {kind: [template_view(message) for message in stub] for kind, stub in _STUBS.items()}


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens to append after a complete assistant turn, by author; `len()` counts them."""

    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.pieces)


class ChatTemplate:
    """Renders prompts and deltas with a Hugging Face fast tokenizer and its chat template.

    `end_ids` are the token ids with which the template ends an assistant turn, `end_id` the one it appends itself;
    `stop_token_ids` is what an engine must be told to stop at. Ids from `vocabulary_size` on have no text. `opens_think` is
    true where the generation prompt leaves a `<think>` block open. Raises TemplateError where the tokenizer or template cannot be used.
    """

    def __init__(self, tokenizer: Any, *, kwargs: Mapping[str, Any] | None = None) -> None:
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"{self.name}: turntrace needs a fast tokenizer (tokenizer.json); this one is slow"
            )
        if not tokenizer.chat_template:
            raise TemplateError(
                f"{self.name}: the tokenizer has no chat template; set `chat_template` in tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.vocabulary_size = (
            max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )  # ids may have gaps
        self._segments = SegmentEncoder(tokenizer)
        self._kwargs = dict(kwargs or {})
        self._compiled = _compiled(self.name, tokenizer)
        self._control = re.compile(
            "|".join(re.escape(token) for token in sorted(tokenizer.all_special_tokens)) or r"(?!)"
        )
        self.end_id, self._end_text = self._find_end(USER)
        self.end_ids = frozenset({self.end_id, *self._call_end()})
        self.stop_token_ids = sorted(self.end_ids | ({tokenizer.eos_token_id} - {None}))
        self._generation = self._generation_text()
        self.opens_think = self._generation.rfind("<think>") > self._generation.rfind("</think>")
        self._frames: dict[str, _Frame] = {}
        self._edges = {kind: self._try(kind, self._find_edges) for kind in (TOOL, USER)}
        self._unproven = {kind: self._try(kind, self._prove) or "" for kind in (TOOL, USER)}
        self._frames = {
            kind: frame
            for kind in (TOOL, USER)
            if not self._unproven[kind] and (frame := self._find_frame(kind))
        }
        self.rewrites_history = self._rewrites_history()

    # ------------------------------------------------------------------ what a conversation asks

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        created: Sequence[Message] = (),
    ) -> list[Piece]:
        """The token ids before the first turn, the generation prompt included.

        `created` are the tool messages that tools gave when they were created: kind `tool`, after the prompt.
        Raises TemplateError where the template refuses the messages.
        """
        whole = self._apply([*messages, *created], tools, generation=True)
        if not created:
            return [(PROMPT, self.encode(whole))]
        start = _common_length(self._apply(messages, tools, generation=False), whole)
        end = len(whole) - len(self._generation) if whole.endswith(self._generation) else len(whole)
        ids, cuts = self._encode_cut(whole, [start, end])
        return [
            (kind, part)
            for kind, part in zip((PROMPT, TOOL, PROMPT), _split(ids, cuts), strict=True)
            if part
        ]

    def delta(self, messages: Sequence[Message], kind: str = TOOL) -> Delta:
        """What the template puts between a complete assistant turn and the next: all of a turn's `messages` together.

        `kind` is "tool" or "user". The cost depends on `messages` alone. Raises TemplateError where the template
        refuses them or was not proven for this kind (see `require`).
        """
        edges = self._edges[kind]
        if isinstance(edges, str):
            raise TemplateError(edges)
        text = self._delta_text(messages, kind)
        ids = self._after_end(text)
        head, tail = edges.scaffold_ids, edges.generation_ids
        stop = len(ids) - len(tail)
        if ids[: len(head)] == head and ids[stop:] == tail and len(head) <= stop:
            parts = [ids[: len(head)], ids[len(head) : stop], ids[stop:]]
        else:  # a token spans an edge: it goes to the block
            parts = self._parts_by_offset(text, edges)
        return Delta(
            tuple(
                (name, part)
                for name, part in zip((TEMPLATE, kind, TEMPLATE), parts, strict=True)
                if part
            )
        )

    def require(self, kind: str) -> None:
        """Raises TemplateError, naming the template and the cause, where deltas of `kind` are not proven exact."""
        if self._unproven[kind]:
            raise TemplateError(
                f"the chat template of {self.name} cannot be continued turn by turn with {kind} messages: {self._unproven[kind]}; "
                "use another chat_template"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of template text, control tokens recognised, none added. Lone surrogates become U+FFFD."""
        return self._segments.encode(without_lone_surrogates(text))

    def encoding(self, text: str) -> Any:
        """The tokenizer's own encoding of `text`: `.ids` [T] and `.offsets` [T] of (start, end) characters."""
        return self._backend.encode(without_lone_surrogates(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens kept, spaces not cleaned up."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def raw(self, sampled_ids: Sequence[int]) -> str:
        """The text of a sampled turn without a trailing end token: an assistant message's `raw`."""
        ends = len(sampled_ids) > 0 and sampled_ids[-1] in self.end_ids
        return self.decode(sampled_ids[:-1] if ends else sampled_ids)

    @property
    def call_format(self) -> CallFormat:
        """How this model writes tool calls."""
        return hermes.FORMAT

    def read(
        self, raw: str, tools: Sequence[Mapping[str, Any]], *, after: Message | None = None
    ) -> ParsedTurn:
        """What a sampled turn says: the one place that reads `raw`.

        `tools` are the OpenAI schemas offered; without any there are no calls. `after` is the
        message before the turn, whose generation prompt may have opened a thought.
        """
        if not tools:
            return ParsedTurn(raw)
        form = self.call_format
        types = ParameterTypes.of(tools) if form.is_typed else NO_TYPES
        return form.parse(raw, types, in_think=self.opens_think)

    def control_tokens(self, text: str) -> list[str]:
        """Special tokens that stand in a text as plain characters; the tokenizer will take them for control tokens."""
        return sorted(set(self._control.findall(text)))

    # ------------------------------------------------------------------ rendering

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool
    ) -> str:
        views = [template_view(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                views,
                tools=list(tools) or None,
                add_generation_prompt=generation,
                tokenize=False,
                **self._kwargs,
            )
        except (
            Exception
        ) as error:  # templates raise through jinja2, and anything else through bad messages
            raise TemplateError(
                f"the chat template of {self.name} refuses the messages: {error}"
            ) from error
        return str(text)

    def _delta_text(self, messages: Sequence[Message], kind: str) -> str:
        """Scaffold, block and generation prompt as text."""
        if frame := self._frames.get(kind):
            return frame.around([message["content"] for message in messages])
        return self._rendered_delta(messages, kind)

    def _rendered_delta(self, messages: Sequence[Message], kind: str) -> str:
        try:
            text = self._compiled([*_STUB_VIEWS[kind], *messages], self._kwargs)
        except Exception as error:
            raise TemplateError(
                f"the chat template of {self.name} refuses {kind} messages: {error}"
            ) from error
        return self._behind_stub(text, kind)

    def _behind_stub(self, text: str, kind: str) -> str:
        """What follows the end token of the stub's assistant turn."""
        mark = text.find(_MARK)
        end = text.find(self._end_text, mark)
        if mark < 0 or end < 0:
            what = "tool calls" if kind == TOOL else "assistant messages"
            raise TemplateError(
                f"the chat template of {self.name} renders {what} without {'their text' if mark < 0 else self._end_text}"
            )
        return text[end + len(self._end_text) :]

    def _after_end(self, text: str) -> list[int]:
        """Ids of text that follows an end token: some tokenizers treat the start of a text differently."""
        ids = self.encode(self._end_text + text)
        if not ids or ids[0] != self.end_id:
            raise TemplateError(
                f"{self.name}: the end token {self._end_text!r} merges with the text after it"
            )
        return ids[1:]

    def _encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each character position, the first token that starts at or after it."""
        encoding = self.encoding(text)
        starts = [start for start, _ in encoding.offsets]
        return list(encoding.ids), [
            next((i for i, start in enumerate(starts) if start >= cut), len(starts)) for cut in cuts
        ]

    def _parts_by_offset(self, text: str, edges: _Edges) -> list[list[int]]:
        shift = len(self._end_text)
        encoding = self.encoding(self._end_text + text)
        spans = encoding.offsets[1:]
        head = sum(1 for _, end in spans if end <= shift + len(edges.scaffold))
        tail = sum(1 for start, _ in spans if start >= shift + len(text) - len(self._generation))
        return _split(list(encoding.ids[1:]), [head, len(spans) - tail])

    # ------------------------------------------------------------------ the probe at load

    def _find_end(self, kind: str) -> tuple[int, str]:
        """The token that ends an assistant turn: the first special one after its text, or the last after a call."""
        text = self._apply(_STUBS[kind], [], generation=False)
        ids = self.encode(text.rpartition(_MARK)[2])
        known = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        specials = [token for token in ids if token in known]
        end = (
            (specials[0] if kind == USER else specials[-1]) if specials else None
        )  # `</tool_call>` may be a token too
        if end is None or _MARK not in text or (kind == USER and ids[0] != end):
            raise TemplateError(
                f"the chat template of {self.name} ends an assistant turn without a special token: no engine can stop there"
            )
        return end, self.decode([end])

    def _call_end(self) -> list[int]:
        """The end token after a tool call, where the template can render one (Llama 3's may differ)."""
        try:
            return [self._find_end(TOOL)[0]]
        except TemplateError:
            return []

    def _generation_text(self) -> str:
        with_prompt = self._apply(_STUBS[USER][:1], [], generation=True)
        without = self._apply(_STUBS[USER][:1], [], generation=False)
        if not with_prompt.startswith(without):
            raise TemplateError(
                f"the chat template of {self.name} rewrites the prompt when add_generation_prompt is set"
            )
        return with_prompt[len(without) :]

    def _find_edges(self, kind: str) -> _Edges:
        """What stands around every block of `kind`, the same whatever the messages are."""
        bare = self._apply(_STUBS[kind], [], generation=False)
        scaffold = self._behind_stub(bare, kind)
        text = self._delta_text(_messages(kind, ["x"]), kind)
        if not (text.startswith(scaffold) and text.endswith(self._generation)):
            raise TemplateError(
                f"the chat template of {self.name} changes the text around {kind} messages"
            )
        generation_ids = self.encode(self._generation) if self._generation else []
        return _Edges(scaffold, self._after_end(scaffold) if scaffold else [], generation_ids)

    def _prove(self, kind: str) -> str:
        """Empty where deltas equal what whole renderings have at that place, in text and ids; else what differs."""
        if isinstance(edges := self._edges[kind], str):
            return edges
        histories = [history for history in _histories(kind) if self._renders(history)]
        if not histories:
            return "it refuses every conversation that was tried"
        for tools in ([], [_PROBE_TOOL]):
            for history in histories:
                for contents in (["42"], ["  two\n\n", "", "{'x': [1]}\n"]):
                    messages = _messages(kind, contents if kind == TOOL else contents[:1])
                    if difference := self._difference(history, messages, tools, kind):
                        return difference
        return ""

    def _renders(self, messages: list[Message]) -> bool:
        """False where the template refuses messages (a system message, say): then no conversation holds them."""
        try:
            return bool(self._apply(messages, [], generation=False))
        except TemplateError:
            return False

    def _difference(
        self,
        history: list[Message],
        messages: list[Message],
        tools: list[dict[str, Any]],
        kind: str,
    ) -> str:
        whole = self._apply([*history, *messages], tools, generation=True)
        text = self._delta_text(messages, kind)
        if not whole.endswith(self._end_text + text):
            return f"after {len(history)} messages{' with tools' if tools else ''} it renders other text than after two"
        delta = [token for _, ids in self.delta(messages, kind).pieces for token in ids]
        if (
            list(self.encoding(whole).ids)
            != list(self.encoding(whole[: len(whole) - len(text)]).ids) + delta
        ):
            return "its tokens merge across the end of a turn"
        return ""

    def _find_frame(self, kind: str) -> _Frame | None:
        """The constant text around contents, where the template puts them down as they are; rendering is then joining."""
        first, second = "frame1", "frame2"
        try:
            one = self._rendered_delta(_messages(kind, [first]), kind)
            head, _, tail = one.partition(first)
            two = self._rendered_delta(_messages(kind, [first, second]), kind)
            frame = _Frame(head, two.partition(first)[2].partition(second)[0], tail)
            for contents in ([text] for text in _ODD_CONTENTS):
                if any(
                    self._rendered_delta(_messages(kind, contents * count, f"call_{count}_0"), kind)
                    != frame.around(contents * count)
                    for count in (1, 2, 3)
                ):
                    return None
        except (
            TemplateError
        ):  # several at once, or odd ones, are refused: rendering them will say so
            return None
        return frame

    def _rewrites_history(self) -> bool:
        """True where a later message changes how an earlier assistant turn is rendered."""
        turn = "<think>\nt\n</think>\n\nanswer"
        messages: list[Message] = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": turn},
        ]
        try:
            return turn not in self._apply(
                [*messages, {"role": "user", "content": "v"}], [], generation=True
            )
        except TemplateError:
            return False

    def _try(self, kind: str, step: Callable[[str], Any]) -> Any:
        try:
            return step(kind)
        except TemplateError as error:
            return str(error)


@dataclass(frozen=True, slots=True)
class _Edges:
    scaffold: str
    scaffold_ids: list[int]
    generation_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Frame:
    head: str
    between: str
    tail: str

    def around(self, contents: Sequence[str]) -> str:
        return f"{self.head}{self.between.join(contents)}{self.tail}"


_ODD_CONTENTS = (
    "", " ", "\n", "  x\n\n", "x y", "<b>&amp;'\"", '{"a": [1, null]}', "[1]", "None", "0", "-1.5", "true", "Error: x", "é\u2028漢🙂",
    "<think>\nx\n</think>\n\ny", "</think>", "<tool_call>", "<tool_response>x</tool_response>", "<|im_end|>", "{{ x }}", "a" * 3000,
)  # fmt: skip
"""What a template may treat specially: blanks, markup, JSON, numbers, thoughts, control tokens, length."""


def _compiled(name: str, tokenizer: Any) -> Callable[[list[Message], Mapping[str, Any]], str]:
    """The template compiled once, with the environment `apply_chat_template` uses, without its per-call set-up."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = _compile_jinja_template(tokenizer.get_chat_template(tools=[_PROBE_TOOL]))
    except Exception as error:  # jinja2's, or transformers' own
        raise TemplateError(f"the chat template of {name} cannot be read: {error}") from error
    special = dict(tokenizer.special_tokens_map)

    def render(messages: list[Message], kwargs: Mapping[str, Any]) -> str:
        return str(
            template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **{**special, **kwargs},
            )
        )

    return render


_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "x"}},
            "required": ["x"],
        },
    },
}


def _messages(kind: str, contents: Sequence[str], call_id: str = "call_0_0") -> list[Message]:
    if kind == USER:
        return [{"role": "user", "content": content} for content in contents]
    return [
        {"role": "tool", "content": content, "tool_call_id": call_id, "name": f"f{call_id}"}
        for content in contents
    ]


def _histories(kind: str) -> list[list[Message]]:
    """Conversations that end where a delta of `kind` starts: short, long, with tool rounds, with thoughts.

    Their calls have another name and id than the stub's: a delta that looks at the call it answers is found out.
    """
    ask: Message = {"role": "user", "content": "Question?"}
    answer: Message = {"role": "assistant", "content": "Answer."}
    other_call = {
        "id": "call_0_0",
        "type": "function",
        "function": {"name": "other", "arguments": '{"y": 1}'},
    }
    call: Message = {"role": "assistant", "content": "Let me see.", "tool_calls": [other_call]}
    thought: Message = {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nSo.",
        "tool_calls": [other_call],
    }
    last = [call] if kind == TOOL else [answer]
    round_trip = [call, *_messages(TOOL, ["1"])]
    try_thought = (
        [thought] if kind == TOOL else [{**answer, "content": "<think>\nhm\n</think>\n\nSo."}]
    )
    return [
        [ask, *last],
        [{"role": "system", "content": "Rules."}, ask, answer, ask, *last],
        [ask, *round_trip, *round_trip, *last],
        [ask, *try_thought],
    ]


def _common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _split(ids: list[int], cuts: Sequence[int]) -> list[list[int]]:
    bounds = [0, *cuts, len(ids)]
    return [ids[start:end] for start, end in pairwise(bounds)]
