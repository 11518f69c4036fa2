"""The turns of one session as a tree: where a request continues, and what the engine has to see.

For a gateway, a request is five steps:

    tree = SessionTree(template)                        # one for each session
    place = tree.match(messages, tools)                 # pure: nothing is added
    place.prompt_ids                                    # what the engine has to see
    turn = tree.add(place, generation, response_id=...) # what it sampled
    turn.served, turn.call_ids                          # what the client gets

- `messages` are in OpenAI's chat schema, as a dialect has read them: text in `content`, arguments
  of calls as JSON text, tool results as messages with a `tool_call_id`. `tools` are OpenAI schemas;
  tools that differ start a root of their own.
- Images are parts `{"type": "image", "image": "sha256:HEX"}`, their sizes in `image_sizes`; they
  are compared by hash. `place.prompt_images` are those that the engine has to see.
- `match` raises MessageError for what is not in the schema, and TemplateError if the chat template
  refuses the messages. A break of the history is never an error: `place.reason` names it.
- `place.earlier` are turns that were sampled after exactly this prompt: a gateway answers a retry
  with one of them if its answer was not delivered. `place.is_same_prompt(other)` compares with a
  request that is still in flight.
- `place_after` is the place of a request whose history is known: a replay's.
- `entry(turn)` is a turn as JSON, its own tokens alone; `restore(entry)` adds it again, in order,
  to an empty tree: a journal's two ends. Notes added later are not in it.
- `record_fields()` are the fields of the session's `Trajectory` that stand here: the trunk's
  sequence and `branches`. See compiled.py.

Invariants: the engine's input is always the path, token for token; each sampled token belongs to
one turn; nothing here knows HTTP or an engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from conversations.errors import MessageError, TemplateError
from conversations.images.sources import hash_of
from conversations.messages import (
    GivenImages,
    MalformedToolCall,
    Message,
    assistant_message,
    given_messages,
    image_parts,
    with_images,
)
from conversations.rounds import kind_of
from conversations.session.compiled import branches_of
from conversations.session.ids import IdRun
from conversations.session.matching import (
    call_ids,
    calls_of,
    in_call_order,
    is_echo,
    is_verbatim,
    same_given,
)
from conversations.session.reasons import (
    RESAMPLED,
    REWRITTEN,
    reason_beside,
    reason_for_root,
)
from conversations.session.reasons import (
    TEMPLATE as NOT_PROVEN,
)
from conversations.session.turn import (
    Place,
    Sampled,
    SessionTurn,
    Tools,
    record_messages,
    served_message,
)
from conversations.template import ChatTemplate, Piece
from conversations.tokens import TEMPLATE
from conversations.trajectory import Branch

ECHO_DIFFERS, REORDERED = "echo_differs", "reordered"
"""Notes of a turn: the client sent it back in other words; tool results came in another order."""
_Rendered = tuple[tuple[tuple[str, IdRun], ...], tuple[dict[str, Any], ...]]
"""Pieces as runs, and the images whose tokens lie in them."""
_BRANCH_ONLY = ("parent", "reason", "client")


class SessionTree:
    """The turns of one session. `turns` are all of them, in the order in which they were added.

    `image_sizes` are the width and height, in pixels, of the images that messages name by hash.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.image_sizes: dict[str, tuple[int, int]] = {}
        self.turns: list[SessionTurn] = []
        self._roots: list[SessionTurn] = []
        self._by_response: dict[str, SessionTurn] = {}

    @property
    def sampled_length(self) -> int:
        """Tokens that were sampled in the session."""
        return sum(len(turn.sampled) for turn in self.turns)

    def turn_of_response(self, response_id: str) -> SessionTurn | None:
        """The turn that was served under this id, for `match(after=...)`."""
        return self._by_response.get(response_id)

    # ------------------------------------------------------------------ a request

    def match(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        after: SessionTurn | None = None,
    ) -> Place:
        """Where a request stands. `after`: `messages` follow this turn (`previous_response_id`).

        Then it stands where a client stands that sends the whole history up to there.
        """
        return self.place(self.find(messages, tools, after=after))

    def find(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        after: SessionTurn | None = None,
    ) -> Found:
        """The first half of `match`, which encodes nothing. Raises MessageError."""
        sent = self._checked(messages)
        if after is not None:
            sent = _whole_history(after, sent, self._checked)
        ordered = in_call_order(sent)
        notes = (REORDERED,) if ordered != sent else ()
        offered = self._known_tools(tools)
        return Found(self._deepest(ordered, offered, after), ordered, offered, notes)

    def place(self, found: Found) -> Place:
        """The second half, which encodes the new messages. Raises TemplateError. It may run in a
        thread of its own: see `as_it_stands`.
        """
        rest = found.messages[found.match.length :]
        return self._place(found.match, rest, found.messages, found.tools, found.notes)

    def as_it_stands(self, place: Place) -> Place:
        """A place that was matched in another thread, with the turns that were added meanwhile."""
        siblings = self._children(place.parent, place.tools)
        earlier = tuple(turn for turn in siblings if _same_messages(turn.given, place.given))
        return replace(place, earlier=earlier)

    def place_after(
        self,
        parent: SessionTurn | None,
        given: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        reason: str | None = None,
    ) -> Place:
        """The place of a request whose history is known: `given` after `parent`, nothing compared.

        Raises TemplateError if the template refuses the messages, or cannot be continued with them.
        """
        offered = parent.tools if parent else self._known_tools(tools)
        messages = list(given)
        if parent is None:
            pieces, images = self._prompt(messages, offered)
        else:
            pieces, images = self._delta(parent, messages)
        return Place(parent, offered, tuple(messages), pieces, reason, images=images)

    def _checked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, each image by the hash of one whose size is known. Raises MessageError."""
        images = GivenImages()
        given = given_messages(messages, images)
        if not images.sources:
            return given
        hashes = [source.sha256 for source in images.sources]
        if not self.image_sizes.keys() >= set(hashes):
            raise MessageError("an image must be named by the hash of one that was read")
        return with_images(given, [f"sha256:{sha256}" for sha256 in hashes])

    def knows_tools(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a turn of the session was offered these tools."""
        return any(root.tools == tools for root in self._roots)

    def _known_tools(self, tools: Sequence[Mapping[str, Any]]) -> Tools:
        """The tools, as the object that a root already has if they are the same."""
        offered: Tools = [dict(tool) for tool in tools]
        return next((root.tools for root in self._roots if root.tools == offered), offered)

    def _children(self, turn: SessionTurn | None, tools: Tools) -> list[SessionTurn]:
        if turn is None:
            return [root for root in self._roots if root.tools == tools]
        return turn.children

    def _deepest(
        self, messages: Sequence[Message], tools: Tools, after: SessionTurn | None
    ) -> _Match:
        """The longest path whose messages the request begins with.

        Of equals the one with `after`, else the latest.
        """
        best = _Match(None)
        pending = [best]
        for before in pending:  # grows while it is read: a session may have thousands of turns
            for child in self._children(before.turn, tools):
                if found := _extended(before, child, messages, after):
                    pending.append(found)
                    best = max(best, found, key=_Match.rank)
        return best

    def _place(
        self,
        match: _Match,
        rest: list[Message],
        messages: list[Message],
        tools: Tools,
        notes: tuple[str, ...],
    ) -> Place:
        siblings = self._children(match.turn, tools)
        earlier = tuple(turn for turn in siblings if _same_messages(turn.given, rest))
        if match.turn is None:
            reason = reason_for_root(rest, tools, self._roots) if self._roots else None
            pieces, images = self._prompt(rest, tools)
            return Place(None, tools, tuple(rest), pieces, reason, notes, earlier, images=images)
        try:
            pieces, images = self._delta(match.turn, rest)
        except TemplateError:
            siblings = self._children(None, tools)
            earlier = tuple(turn for turn in siblings if _same_messages(turn.given, messages))
            reason = RESAMPLED if earlier else NOT_PROVEN
            pieces, images = self._prompt(messages, tools)
            given = tuple(messages)
            return Place(None, tools, given, pieces, reason, notes, earlier, images=images)
        reason = self._reason(rest, siblings)
        echoes = tuple(match.echoes)
        return Place(match.turn, tools, tuple(rest), pieces, reason, notes, earlier, echoes, images)

    def _reason(self, rest: Sequence[Message], siblings: Sequence[SessionTurn]) -> str | None:
        if siblings:
            return reason_beside(rest, siblings)
        is_written = any(message["role"] == "assistant" for message in rest)
        return REWRITTEN if is_written else None

    # ------------------------------------------------------------------ its tokens

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> _Rendered:
        return self._placed(self.template.prompt(messages, tools), messages, 0)

    def _placed(self, pieces: Sequence[Piece], messages: Sequence[Message], at: int) -> _Rendered:
        """Pieces with the tokens of the messages' images, which stand from token `at` of the path.

        Raises ImageError if a text holds the token that stands for an image.
        """
        template = self.template
        hashes = [hash_of(part["image"]) for part in image_parts(messages)]
        if template.images is None and not hashes:
            return _runs(pieces), ()
        sizes = [self.image_sizes[sha256] for sha256 in hashes]
        grids = [template.images.grid(*size) for size in sizes] if template.images else []
        placed, spans = template.place(pieces, grids)
        images = tuple(
            {
                "sha256": sha256,
                "width": size[0],
                "height": size[1],
                "grid": list(grid),
                "start": start + at,
                "end": end + at,
            }
            for sha256, size, grid, (start, end) in zip(hashes, sizes, grids, spans, strict=True)
        )
        return _runs(placed), images

    def _delta(self, turn: SessionTurn, rest: Sequence[Message]) -> _Rendered:
        """What stands between a turn and the next. Raises TemplateError if it is not proven."""
        if not rest:
            raise TemplateError("no message follows the turn")
        messages = record_messages(rest, turn)
        delta = self.template.follow(messages, turn.message, with_tools=bool(turn.tools))
        missing = self.template.missing_end(turn.sampled.ids[-1], kind_of(messages))
        return self._placed([(TEMPLATE, missing), *delta.pieces], messages, turn.end)

    # ------------------------------------------------------------------ a turn

    def add(
        self,
        place: Place,
        sampled: Sampled,
        *,
        response_id: str | None = None,
        asked: Mapping[str, Any] | None = None,
        client: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> SessionTurn:
        """Adds what was sampled at a place. `client` are the hints of the request's headers.

        Raises TemplateError or OverflowError if the ids have no text.
        """
        turn = self._turn(place, sampled, place.reason or self._reason_now(place))
        turn.response_id = response_id
        turn.asked, turn.client = dict(asked or {}), dict(client or {})
        turn.notes += [*place.notes, *notes]
        for echo in place.echoes:
            if ECHO_DIFFERS not in echo.notes:
                echo.notes.append(ECHO_DIFFERS)
        return self._append(turn)

    def _reason_now(self, place: Place) -> str | None:
        """Why a place that continued its session no longer does: another turn was added there."""
        if place.parent is None:
            if not self._roots:
                return None
            return reason_for_root(place.given, place.tools, self._roots)
        return self._reason(place.given, place.parent.children)

    def _turn(self, place: Place, sampled: Sampled, reason: str | None) -> SessionTurn:
        template, number = self.template, len(self.turns)
        ids = list(sampled.token_ids)
        raw = template.raw(ids)
        before = place.given[-1] if place.given else None
        parsed = template.read(raw, place.tools, after=before)
        index = place.parent.index + 1 if place.parent else 0
        places = range(len(parsed.calls))
        names = {tool["function"]["name"] for tool in place.tools}
        served = served_message(parsed, [f"call_{number:08x}_{k}" for k in places])
        return SessionTurn(
            number=number,
            parent=place.parent,
            reason=reason,
            tools=place.tools,
            given=list(place.given),
            pieces=place.pieces,
            sampled=IdRun(ids),
            logprobs=array("d", sampled.logprobs),
            finish_reason=sampled.finish_reason,
            message=assistant_message(raw, parsed, [f"call_{index}_{k}" for k in places]),
            served=served,
            parsed=parsed,
            invalid=tuple(
                isinstance(call, MalformedToolCall) or call.name not in names
                for call in parsed.calls
                if call.name
            ),
            is_complete=ids[-1] in template.end_ids or sampled.finish_reason == "stop",
            cached_tokens=sampled.cached_tokens,
            queue_s=sampled.queue_s,
            engine_s=sampled.engine_s,
            weight_version=sampled.weight_version,
            images=place.images,
        )

    def _append(self, turn: SessionTurn) -> SessionTurn:
        (turn.parent.children if turn.parent else self._roots).append(turn)
        self.turns.append(turn)
        if turn.response_id is not None:
            self._by_response[turn.response_id] = turn
        return turn

    def break_cycles(self) -> None:
        """Frees the memory of turns without the garbage collector. Call it last: the tree cannot
        be matched or compiled any more.
        """
        for turn in self.turns:
            turn.children.clear()

    # ------------------------------------------------------------------ the journal, the record

    def entry(self, turn: SessionTurn) -> dict[str, Any]:
        """A turn as JSON values: what `restore` needs beside the turns before it."""
        images = {"images": list(turn.images)} if turn.images else {}
        return {
            **images,
            "number": turn.number,
            "parent": turn.parent.number if turn.parent else None,
            "reason": turn.reason,
            "tools": None if turn.parent else turn.tools,
            "given": turn.given,
            "pieces": [[kind, ids.ids.tolist()] for kind, ids in turn.pieces],
            "token_ids": turn.sampled.ids.tolist(),
            "logprobs": turn.logprobs.tolist(),
            "finish_reason": turn.finish_reason,
            "cached_tokens": turn.cached_tokens,
            "queue_s": turn.queue_s,
            "engine_s": turn.engine_s,
            "weight_version": turn.weight_version,
            "response_id": turn.response_id,
            "asked": dict(turn.asked),
            "client": dict(turn.client),
            "notes": list(turn.notes),
        }

    def restore(self, entry: Mapping[str, Any]) -> SessionTurn:
        """Adds the turn of an `entry`. Raises ValueError if a turn before it is missing."""
        parent = entry["parent"]
        if entry["number"] != len(self.turns) or (parent is not None and parent >= len(self.turns)):
            raise ValueError(f"turn {entry['number']} does not follow {len(self.turns)} turns")
        before = None if parent is None else self.turns[parent]
        tools = before.tools if before else self._known_tools(entry["tools"])
        images = tuple(entry.get("images", ()))
        self.image_sizes |= {one["sha256"]: (one["width"], one["height"]) for one in images}
        given = tuple(entry["given"])
        place = Place(before, tools, given, _runs(entry["pieces"]), images=images)
        turn = self._turn(place, _Restored(entry), entry["reason"])
        turn.response_id = entry["response_id"]
        turn.asked, turn.client = entry["asked"], entry["client"]
        turn.notes += entry["notes"]
        return self._append(turn)

    def branches(self) -> list[Branch]:
        """The session's sequences for the record: the trunk, then the branches."""
        return branches_of(self._roots)

    def record_fields(self) -> dict[str, Any]:
        """The fields of the session's `Trajectory` that stand here: the trunk's and `branches`.

        A session without a turn has empty ones.
        """
        sequences = self.branches()
        names = [item.name for item in fields(Branch) if item.name not in _BRANCH_ONLY]
        found = {name: getattr(sequences[0], name) if sequences else [] for name in names}
        return {**found, "num_turns": len(found["turns"]), "branches": sequences[1:]}


def characters_of(messages: Iterable[Message]) -> int:
    """Characters of the contents of messages; images have none."""
    contents = (message["content"] for message in messages)
    return sum(len(one) if isinstance(one, str) else _text_length(one) for one in contents)


def _text_length(parts: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(part.get("text", "")) for part in parts)


@dataclass(frozen=True, slots=True)
class _Match:
    """A path that a request begins with: its last turn, and how many messages it has."""

    turn: SessionTurn | None
    length: int = 0
    echoes: tuple[SessionTurn, ...] = ()
    same_ids: int = 0
    is_after: bool = False

    def rank(self) -> tuple[int, int, bool, int]:
        """The longest path first; among equals the one with the client's call ids, the one that
        the client named, the latest.
        """
        number = self.turn.number if self.turn else -1
        return self.length, self.same_ids, self.is_after, number


@dataclass(frozen=True, slots=True)
class Found:
    """What `SessionTree.find` found: the messages that a path begins with, and the rest."""

    match: _Match
    messages: list[Message]
    tools: Tools
    notes: tuple[str, ...]

    @property
    def new_characters(self) -> int:
        """Characters of the messages that no path of the session begins with."""
        return characters_of(self.messages[self.match.length :])


def _whole_history(
    turn: SessionTurn,
    messages: Sequence[Message],
    checked: Callable[[Sequence[Message]], list[Message]],
) -> list[Message]:
    """The messages after a turn and all before them, as a client that replays them sends them.

    System messages at the beginning take the place of the earlier ones.
    """
    past = checked([one for each in turn.path() for one in (*each.given, each.served)])
    start = next(
        (place for place, one in enumerate(messages) if one["role"] != "system"), len(messages)
    )
    if start:
        past = [one for one in past if one["role"] != "system"]
    whole = [*messages[:start], *past, *messages[start:]]
    calls = [call for one in past for call in calls_of(one)]
    names = {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
    return [
        {"name": names[one["tool_call_id"]], **one}
        if one["role"] == "tool" and one.get("tool_call_id") in names
        else one
        for one in whole
    ]


def _extended(
    match: _Match, child: SessionTurn, messages: Sequence[Message], after: SessionTurn | None
) -> _Match | None:
    """The match with one turn more, if the messages have it."""
    end = match.length + len(child.given)
    if end >= len(messages) or not is_echo(messages[end], child.served, child.invalid, child.tools):
        return None
    if not all(map(same_given, messages[match.length : end], child.given)):
        return None
    differs = not is_verbatim(messages[end], child.served)
    echoes = (*match.echoes, child) if differs else match.echoes
    same_ids = call_ids(messages[end]) == child.call_ids
    is_after = match.is_after or child is after
    return _Match(child, end + 1, echoes, match.same_ids + same_ids, is_after)


class _Restored:
    """A journal's entry as what an engine returned."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.token_ids: list[int] = entry["token_ids"]
        self.logprobs: list[float] = entry["logprobs"]
        self.finish_reason: str = entry["finish_reason"]
        self.cached_tokens: int | None = entry["cached_tokens"]
        self.queue_s: float | None = entry["queue_s"]
        self.engine_s: float | None = entry["engine_s"]
        self.weight_version: str | None = entry["weight_version"]


def _runs(pieces: Iterable[Piece]) -> tuple[tuple[str, IdRun], ...]:
    return tuple((kind, IdRun(ids)) for kind, ids in pieces if ids)


def _same_messages(one: Sequence[Message], other: Sequence[Message]) -> bool:
    return len(one) == len(other) and all(map(same_given, one, other))
