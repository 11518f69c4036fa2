"""The chat template of a model: prompts, deltas between turns, and what a sampled turn says.

The one place that knows both messages and tokens. Deltas: see deltas.py. Call formats: proven, not
believed; see ../formats/proof.py. Where a template rewrites *earlier* turns (Qwen3 drops old
`<think>` blocks) the deltas still hold: the sampled tokens stay, and `rewrites_history` says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conversations.encoding import SegmentEncoder, without_lone_surrogates
from conversations.errors import ImageError, TemplateError
from conversations.formats.proof import NOT_PROVEN, FormatReport
from conversations.images.processor import PLACEHOLDER, VIDEO, Grid, ImageProcessor, place
from conversations.messages import Message, ParsedTurn
from conversations.rounds import kind_of
from conversations.template.deltas import Delta, Deltas, End, split_at
from conversations.template.mixed import MixedDeltas
from conversations.template.probing import (
    PROBE_TOOL,
    answers,
    find_dialect,
    probe_call,
    user,
)
from conversations.template.reading import Reader, Reading
from conversations.template.renderer import Renderer
from conversations.tokenizer import KEPT
from conversations.tokens import PROMPT, TOOL, USER, Piece

_CALL = probe_call("f", "call_0_0", {"x": "1"})


class ChatTemplate:
    """Renders prompts and deltas with a Hugging Face fast tokenizer and its chat template.

    `end_ids` are the ids with which the template ends an assistant turn, `end_id` the one that it
    puts after an answer; `stop_token_ids` is what an engine must be told to stop at. Ids from
    `vocabulary_size` on have no text. `images` is the model's image
    processor, None for a model that sees none. Raises TemplateError if the tokenizer or its
    template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        reading: Reading = Reading(),  # noqa: B008 - frozen
        images: ImageProcessor | None = None,
    ) -> None:
        self.images = images
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        _check(self.name, tokenizer)
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._segments = SegmentEncoder(tokenizer)
        self._renderer = Renderer(self.name, tokenizer, kwargs or {})
        self._renderer.compile()
        self._renderer.dialect = find_dialect(self._renderer)
        asking = self._try_deltas(USER)
        likely_end = None if isinstance(asking, str) else asking.end
        self._deltas = {TOOL: self._try_deltas(TOOL, likely_end), USER: asking}
        working = {k: each for k, each in self._deltas.items() if isinstance(each, Deltas)}
        if not working:
            raise TemplateError(str(self._deltas[USER]))
        self.end_id = working.get(USER, working.get(TOOL)).end.token  # type: ignore[union-attr]
        self.end_ids = frozenset(each.end.token for each in working.values())
        # A sampled placeholder would be taken for an image: the engine stops there.
        reserved = images.reserved_ids if images else ()
        stops = {*self.end_ids, tokenizer.eos_token_id, *reserved} - {None}
        self.stop_token_ids = sorted(stops)
        self._problems: dict[tuple[str, bool], str] = {}
        self._images_unproven: dict[tuple[str, bool], str] = {}
        self._framed: set[str] = set()
        ends = {each.end.text for each in working.values()}
        self._reader = Reader(self._renderer, ends, reading)

    # ------------------------------------------------------------------ what a conversation asks

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        created: Sequence[Message] = (),
    ) -> list[Piece]:
        """The token ids before the first turn, the generation prompt included.

        `created` are the tool messages that tools gave when they were created: kind `tool`, after
        the prompt. Raises TemplateError if the template refuses the messages.
        """
        whole = self._renderer.whole([*messages, *created], tools, generation=True)
        if not created:
            return [(PROMPT, self.encode(whole))]
        common = self._renderer.common_length
        start = common(self._renderer.whole(messages, tools, generation=False), whole)
        quiet = self._renderer.whole([*messages, *created], tools, generation=False)
        ids, cuts = self._encode_cut(whole, [start, max(start, common(quiet, whole))])
        return [
            (kind, part)
            for kind, part in zip((PROMPT, TOOL, PROMPT), split_at(ids, cuts), strict=True)
            if part
        ]

    def delta(
        self, messages: Sequence[Message], kind: str = TOOL, *, turn: Message | None = None
    ) -> Delta:
        """What stands between a complete assistant turn and the next: all of its `messages`
        together.

        `kind` is "tool" or "user"; `turn` is the assistant message that they answer: some templates
        print the names or ids of its calls. The cost depends on `messages` alone. Raises
        TemplateError if the template refuses them or has no such deltas (see `require`).
        """
        deltas = self._deltas[kind]
        if isinstance(deltas, str):
            raise TemplateError(deltas)
        self._find_frame(kind)
        return deltas.delta(messages, turn)

    def follow(
        self, messages: Sequence[Message], turn: Message, *, with_tools: bool = False
    ) -> Delta:
        """`delta` for messages of any roles, in order: what may stand after a turn of a session.

        `with_tools`: tools are offered. Raises TemplateError if the template refuses the messages,
        or if deltas of this kind are not proven.
        """
        found = {message["role"] for message in messages}
        if found in ({TOOL}, {USER}) and (found == {TOOL} or len(messages) == 1):
            kind = found.pop()
            self.require(kind, with_tools=with_tools)
            return self.delta(messages, kind, turn=turn)
        kind = kind_of(messages)
        self.require(kind, with_tools=with_tools)
        return self._mixed[kind].delta(messages, turn, with_tools=with_tools)

    @functools.cached_property
    def _mixed(self) -> dict[str, MixedDeltas]:
        return {
            kind: MixedDeltas(each, self._renderer, self.encode, self.encoding)
            for kind, each in self._deltas.items()
            if isinstance(each, Deltas)
        }

    def missing_end(self, last_id: int | None, kind: str) -> list[int]:
        """The end token that a turn lacks before a delta of `kind`, given its last id.

        Empty if it has one. A token that opens the next block ends turns of its own kind alone.
        """
        deltas = self._deltas[kind]
        if isinstance(deltas, str):
            raise TemplateError(deltas)
        return [] if last_id in self._ends_before[kind] else [deltas.end.token]

    @functools.cached_property
    def _ends_before(self) -> dict[str, frozenset[int]]:
        ends = {k: each.end for k, each in self._deltas.items() if isinstance(each, Deltas)}
        closing = {end.token for end in ends.values() if not end.opens_next}
        return {
            kind: frozenset({end.token} if end.opens_next else closing)
            for kind, end in ends.items()
        }

    def require(self, kind: str, *, with_tools: bool = False) -> None:
        """Raises TemplateError, naming the cause, if deltas of `kind` are not proven exact.

        `with_tools`: in conversations that offer tools; those of kind "tool" always do.
        """
        if problem := self._problem(kind, with_tools or kind == TOOL):
            raise TemplateError(
                f"the chat template of {self.name} cannot be continued turn by turn with {kind} "
                f"messages: {problem}; use another chat_template"
            )
        self._find_frame(kind)

    def _problem(self, kind: str, with_tools: bool) -> str:
        """Why deltas of `kind` are not proven; empty if they are. Proven when first asked for."""
        key = kind, with_tools
        if key not in self._problems:
            self._problems[key] = self._try_proof(kind, with_tools)
        return self._problems[key]

    def _find_frame(self, kind: str) -> None:
        """Makes later deltas of `kind` cheap, if they are proven."""
        if kind in self._framed:
            return
        self._framed.add(kind)
        deltas = self._deltas[kind]
        if isinstance(deltas, Deltas) and not self._problem(kind, True):
            deltas.find_frame()

    # ------------------------------------------------------------------ images

    def image_problem(self, kind: str, *, with_tools: bool = False) -> str:
        """Why messages of `kind` cannot hold images; empty if they can, which is proven then."""
        if self.images is None:
            return f"{self.name} sees no images"
        key = kind, with_tools or kind == TOOL
        if key not in self._images_unproven:
            self._images_unproven[key] = self._try_images(*key, self.images.placeholder_id)
        if problem := self._images_unproven[key]:
            return (
                f"the chat template of {self.name} cannot show images in {kind} messages: {problem}"
            )
        return ""

    def place(
        self, pieces: Sequence[Piece], grids: Sequence[Grid]
    ) -> tuple[list[Piece], list[tuple[int, int]]]:
        """Rendered pieces with each placeholder as the tokens of its image, and their spans.

        `grids` are those of the messages' images, in order; spans count from the first token of the
        pieces. Raises ImageError if there are more or fewer placeholders.
        """
        if self.images is not None:
            return place(pieces, grids, self.images)
        if grids:
            raise ImageError(f"the messages hold {len(grids)} images; {self.name} sees none")
        return list(pieces), []

    def holds_placeholder(self, text: str) -> str:
        """The token in a text that only an image may stand for; empty if there is none."""
        if self.images is None:
            return ""
        return next((token for token in (PLACEHOLDER, VIDEO) if token in text), "")

    # ------------------------------------------------------------------ ids and text

    def encode(self, text: str) -> list[int]:
        """Token ids of template text, control tokens recognized, none added. Lone surrogates become
        U+FFFD.
        """
        return self._segments.encode(without_lone_surrogates(text))

    def use_fast_encoder(self) -> bool:
        """Encodes with `fastokens` if it gives the tokenizer's ids for this template's renderings.

        For what runs conversations; what checks records does not. Returns whether it is used.
        """
        return self._segments.use_fast(self._renderings())

    @property
    def encoder(self) -> str:
        """The package that encodes whole texts."""
        return "fastokens" if self._segments.is_fast else "tokenizers"

    def _renderings(self) -> Iterator[str]:
        """Conversations as the template renders them, with tools and without."""
        turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [_CALL]}
        for tools in ([PROBE_TOOL], []):
            for messages in ([user("u")], [user("é\u2028漢"), turn, *answers([_CALL], ["42\n"])]):
                with contextlib.suppress(TemplateError):
                    yield self._renderer.whole(messages, tools, generation=True)

    def encoding(self, text: str) -> Any:
        """The tokenizer's own encoding of `text`: `.ids` [T] and `.offsets` [T] of (start, end)
        characters.
        """
        return self._backend.encode(without_lone_surrogates(text), add_special_tokens=False)

    @property
    def vocabulary_size(self) -> int:
        return _vocabulary_size(self._backend, len(self._backend.get_added_tokens_decoder()))

    def has_text(self, token_id: int) -> bool:
        """Whether an id is below `vocabulary_size`."""
        if token_id.bit_length() > 32:  # no tokenizer takes it
            return False
        return self._backend.id_to_token(token_id) is not None or token_id < self.vocabulary_size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens kept, spaces not cleaned up."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def raw(self, sampled_ids: Sequence[int]) -> str:
        """The text of a sampled turn without a trailing end token: an assistant message's `raw`."""
        ends = len(sampled_ids) > 0 and sampled_ids[-1] in self.end_ids
        return self.decode(sampled_ids[:-1] if ends else sampled_ids)

    def control_tokens(self, text: str) -> list[str]:
        """Special tokens that stand in a text as plain characters.

        The tokenizer will take them for control tokens.
        """
        return sorted(set(self._control.findall(text)))

    @functools.cached_property
    def _control(self) -> Any:
        import re

        names = sorted(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each character position, the first token that starts at or after
        it.
        """
        encoding = self.encoding(text)
        starts = [start for start, _ in encoding.offsets]
        return list(encoding.ids), [
            next((i for i, start in enumerate(starts) if start >= cut), len(starts)) for cut in cuts
        ]

    # ------------------------------------------------------------------ what a turn says

    def read(
        self,
        raw: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        after: Message | None = None,
        split_thought: bool = True,
    ) -> ParsedTurn:
        """What a sampled turn says: the one place that reads `raw`.

        `tools` are the OpenAI schemas offered; without any there are no calls. `after` is the
        message before the turn, whose generation prompt may have opened a thought. Records of
        `turntrace/1` have thoughts in their content: without `split_thought` they stay there.
        Raises CallFormatError if the model's call format is not proven (see `require_tools`).
        """
        kind = TOOL if after and after["role"] == TOOL else USER
        in_think = self.opens_thought[kind]
        return self._reader.read(raw, tools, in_think=in_think, split_thought=split_thought)

    def require_tools(self) -> FormatReport:
        """The call format of a run with tools, which is proven or taken by `Reading.unproven`.

        Raises TemplateError if tool deltas are not proven, CallFormatError if the format is not.
        """
        self.require(TOOL)
        form = self._reader.form
        report = self._reader.report
        return report if report.name == form.name else FormatReport(form.name, NOT_PROVEN)

    def format_entry(self) -> dict[str, Any]:
        """`call_format` of a run.json: the format that turns are read with, and what is proven of
        it.
        """
        report, reading = self._reader.report, self._reader.reading
        source = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        return {
            "name": report.name,
            "proven": report.is_proven,
            "how": report.how,
            "calls_in_thoughts": reading.calls_in_thoughts,
            "template_sha256": hashlib.sha256(source.encode(errors="replace")).hexdigest(),
        }

    def format_report(self) -> FormatReport:
        """What is proven of the model's call format; the problem in words if nothing is."""
        return self._reader.report

    @functools.cached_property
    def opens_thought(self) -> dict[str, bool]:
        """Whether the generation prompt behind messages of a kind leaves a thought open."""
        texts = {k: each.generation for k, each in self._deltas.items() if isinstance(each, Deltas)}
        likely = next(iter(texts.values()))
        tags = self._reader.thought
        return {kind: tags.is_open(texts.get(kind, likely)) for kind in (TOOL, USER)}

    @functools.cached_property
    def rewrites_history(self) -> bool:
        """Whether a later message changes how a turn with a thought is rendered."""
        tags, mark = self._reader.thought, "thoughtful9"
        inside = f"{tags.open}\n{mark}\n{tags.close}\n\nanswer"
        earlier = self._rendered({"content": inside}, user("v"))
        if earlier and inside not in earlier:
            return True
        beside = {"content": "answer", "reasoning_content": mark}
        return mark in self._rendered(beside) and mark not in self._rendered(beside, user("v"))

    def _rendered(self, turn: Message, *behind: Message) -> str:
        """A short conversation with an assistant's turn; empty if the template refuses it."""
        messages = [user("u"), {"role": "assistant", **turn}, *behind]
        try:
            return self._renderer.whole(messages, [], generation=False)
        except TemplateError:
            return ""

    # ------------------------------------------------------------------ the probe at load

    def _try_deltas(self, kind: str, likely_end: End | None = None) -> Deltas | str:
        try:
            return Deltas(kind, self._renderer, self.encode, self.encoding, likely_end)
        except TemplateError as error:
            return str(error)

    def _try_proof(self, kind: str, with_tools: bool) -> str:
        deltas = self._deltas[kind]
        if isinstance(deltas, str):
            return deltas
        try:
            return deltas.prove(with_tools)
        except TemplateError as error:
            return str(error)

    def _try_images(self, kind: str, with_tools: bool, placeholder: int) -> str:
        deltas = self._deltas[kind]
        if isinstance(deltas, str):
            return deltas
        if problem := self._problem(kind, with_tools):
            return problem
        try:
            return deltas.prove_images(with_tools, placeholder)
        except TemplateError as error:
            return str(error)


@functools.lru_cache(KEPT)
def _vocabulary_size(backend: Any, added_tokens: int) -> int:
    """One more than the largest id of a `tokenizers.Tokenizer`: ids may have gaps. It takes as long
    as a template's proof.
    """
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _check(name: str, tokenizer: Any) -> None:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TemplateError(
            f"{name}: turntrace needs a fast tokenizer (tokenizer.json); this one is slow"
        )
    if not tokenizer.chat_template:
        raise TemplateError(
            f"{name}: the tokenizer has no chat template; "
            "set `chat_template` in tokenizer_config.json"
        )
