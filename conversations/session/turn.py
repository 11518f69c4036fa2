"""A turn of a session, and the place of a request among the turns.

Each turn knows the turn that it continues (`parent`), the messages and tokens that stand between,
and its own sampled tokens. The tokens of a *path* are those of its turns, first to last: what the
engine saw and sampled. Nothing of it ever changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from conversations.messages import (
    MalformedToolCall,
    Message,
    ParsedTurn,
    ToolCall,
    arguments_text,
)
from conversations.session.ids import IdRun, PathIds

Tools = list[dict[str, Any]]
"""OpenAI tool schemas."""


class Sampled(Protocol):
    """What an engine returned: `agent.engines.engine.Generation` is one.

    `token_ids` [T], `logprobs` [T], counts in tokens, times in seconds.
    """

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def cached_tokens(self) -> int | None: ...
    @property
    def queue_s(self) -> float | None: ...
    @property
    def engine_s(self) -> float | None: ...
    @property
    def weight_version(self) -> str | None: ...


@dataclass(slots=True, eq=False)
class SessionTurn:
    """One sampled turn. Two turns are equal only if they are the same one.

    `number` counts the turns of the session, in the order in which they were added; `index` those
    of the path, from 0. `given` are the client's messages since `parent`, `pieces` their tokens by
    author, generation prompt included. `reason` is why it does not continue where its parent (or
    the session) stood; None if it does. `served` is the assistant message that the client gets,
    with `call_ids` that are unique in the session; `message` is the record's. `parsed` is what the
    turn says. `images` are those of `given` as a record has them, their tokens counted along the
    path. `notes`, `asked` and `response_id` go to the record; a gateway may add to `notes`.
    """

    number: int
    parent: SessionTurn | None
    reason: str | None
    tools: Tools
    given: list[Message]
    pieces: tuple[tuple[str, IdRun], ...]
    sampled: IdRun
    logprobs: array[float]
    finish_reason: str
    message: Message
    served: Message
    parsed: ParsedTurn
    invalid: tuple[bool, ...]
    is_complete: bool
    cached_tokens: int | None = None
    queue_s: float | None = None
    engine_s: float | None = None
    weight_version: str | None = None
    response_id: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    children: list[SessionTurn] = field(default_factory=list)
    images: tuple[dict[str, Any], ...] = ()
    index: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        before = self.parent
        self.index = before.index + 1 if before else 0
        self.start = (before.end if before else 0) + sum(len(ids) for _, ids in self.pieces)

    @property
    def end(self) -> int:
        """Tokens of the path up to and with this turn; `start` are those that the engine saw."""
        return self.start + len(self.sampled)

    @property
    def calls(self) -> tuple[ToolCall | MalformedToolCall, ...]:
        """The calls of the turn, as they were parsed."""
        return self.parsed.calls

    @property
    def call_ids(self) -> list[str]:
        """The ids of the calls that the client gets, in order."""
        return [call["id"] for call in self.served.get("tool_calls", ())]

    def path(self) -> list[SessionTurn]:
        """The turns from the root to this one."""
        turns: list[SessionTurn] = []
        turn: SessionTurn | None = self
        while turn:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def runs(self) -> list[IdRun]:
        """The tokens of the path, this turn's sampled ones included."""
        return [run for turn in self.path() for run in turn.own_runs()]

    def path_images(self) -> list[dict[str, Any]]:
        """The images of the path, in order."""
        return [image for turn in self.path() for image in turn.images]

    def own_runs(self) -> list[IdRun]:
        """The tokens that the path has beyond the parent's."""
        return [*(ids for _, ids in self.pieces), self.sampled]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands among the turns of its session. Nothing is added yet.

    `parent` is the turn that it continues, None if it starts anew. `given` are the client's
    messages since then, `pieces` their tokens by author. `reason` is None if the request continues
    where the session stood; else one of the eight reasons of a branch. `earlier` are the turns
    that were sampled after exactly this prompt, oldest first: a retry, or a wish for another
    sample. `echoes` are the turns of the path that the client sent back in other words.
    `images` are those of `given`, their tokens counted along the path.
    """

    parent: SessionTurn | None
    tools: Tools
    given: tuple[Message, ...]
    pieces: tuple[tuple[str, IdRun], ...]
    reason: str | None = None
    notes: tuple[str, ...] = ()
    earlier: tuple[SessionTurn, ...] = ()
    echoes: tuple[SessionTurn, ...] = ()
    images: tuple[dict[str, Any], ...] = ()

    @property
    def prompt_images(self) -> list[dict[str, Any]]:
        """The images whose tokens lie in `prompt_ids`, in order."""
        return [*(self.parent.path_images() if self.parent else ()), *self.images]

    @property
    def prompt_ids(self) -> PathIds:
        """What the engine has to see: a sequence of ids with `json()` for servers."""
        before = self.parent.runs() if self.parent else []
        return PathIds([*before, *(ids for _, ids in self.pieces)])

    @property
    def prompt_length(self) -> int:
        """`len(prompt_ids)`."""
        return self.matched_length + self.added_length

    @property
    def matched_length(self) -> int:
        """Tokens of the path that the request continues."""
        return self.parent.end if self.parent else 0

    @property
    def added_length(self) -> int:
        """Tokens that the request adds to it, generation prompt included."""
        return sum(len(ids) for _, ids in self.pieces)

    def is_same_prompt(self, other: Place) -> bool:
        """Whether the engine would see the same ids after the same turn: a retry in flight."""
        if self.parent is not other.parent or len(self.pieces) != len(other.pieces):
            return False
        pairs = zip(self.pieces, other.pieces, strict=True)
        return all(one[0] == two[0] and one[1].ids == two[1].ids for one, two in pairs)


def served_message(parsed: ParsedTurn, call_ids: Sequence[str]) -> Message:
    """The assistant message that the client gets, in OpenAI's schema; thoughts beside the content.

    A malformed call goes out with its raw text as arguments; one without a name stays in the text.
    `call_ids` name all calls in order.
    """
    unnamed = [call.raw for call in parsed.calls if not call.name]
    message: Message = {"role": "assistant", "content": parsed.content + "".join(unnamed)}
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    calls = [
        _served_call(call, call_id)
        for call, call_id in zip(parsed.calls, call_ids, strict=True)
        if call.name
    ]
    if calls:
        message["tool_calls"] = calls
    return message


def _served_call(call: ToolCall | MalformedToolCall, call_id: str) -> dict[str, Any]:
    arguments = arguments_text(call.arguments) if isinstance(call, ToolCall) else call.raw
    function = {"name": call.name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def record_messages(given: Sequence[Message], turn: SessionTurn | None) -> list[Message]:
    """A client's messages after `turn` as the record has them, and as a template sees them.

    Call ids that the client got are unique in the session; the record's count along the path.
    A tool message gets the name of its call, which some templates print.
    """
    if turn is None or not turn.call_ids:
        return list(given)
    ids = dict(zip(turn.call_ids, turn.served["tool_calls"], strict=True))
    return [_record_message(message, turn, ids) for message in given]


def _record_message(
    message: Message, turn: SessionTurn, calls: Mapping[str, Mapping[str, Any]]
) -> Message:
    call = calls.get(message.get("tool_call_id", ""))
    if message["role"] != "tool" or call is None:
        return message
    place = call["id"].rpartition("_")[2]
    return {
        **message,
        "tool_call_id": f"call_{turn.index}_{place}",
        "name": call["function"]["name"],
    }
