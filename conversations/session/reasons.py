"""Why a request does not continue where its session stood: one of eight reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conversations.messages import Message
from conversations.session.matching import call_ids, calls_of, same_calls, same_given
from conversations.session.turn import SessionTurn, Tools

NEW, TOOLS, SYSTEM, EDITED = "new", "tools", "system", "edited"
REWRITTEN, DROPPED, RESAMPLED, TEMPLATE = "rewritten", "dropped", "resampled", "template"

REASONS = {
    NEW: "shares no message with the session: a sub-agent, a title, a fresh context",
    TOOLS: "the same messages with other tools",
    SYSTEM: "the same messages under another system message",
    EDITED: "an earlier message or call was changed",
    REWRITTEN: "an assistant message that the client wrote itself",
    DROPPED: "a sampled turn was left out",
    RESAMPLED: "the same prompt, for another answer",
    TEMPLATE: "the chat template cannot be continued with these messages: rendered whole",
}
"""The eight reasons of a branch, and what each says."""


def reason_beside(rest: Sequence[Message], siblings: Sequence[SessionTurn]) -> str | None:
    """Why `rest` departs from the turns that continue the same turn; None if it shares nothing.

    Decided by the turn whose messages it shares longest: one whose messages it shares all, the
    latest of those.
    """
    shared, turn = max(
        ((common_length(rest, turn.given), turn) for turn in siblings),
        key=lambda pair: (pair[0], pair[0] == len(pair[1].given), pair[1].number),
        default=(0, None),
    )
    if turn is None:
        return None
    if shared < len(turn.given):
        return EDITED if _says_more(rest[:shared]) or turn.parent else None
    if shared == len(rest):
        return RESAMPLED
    return _instead_of(rest[shared], turn)


def _instead_of(message: Message, turn: SessionTurn) -> str:
    """What the client did with a sampled turn, given the message that stands in its place."""
    if message["role"] != "assistant":
        return DROPPED
    is_its_calls = bool(calls_of(message)) and call_ids(message) == turn.call_ids
    if is_its_calls and not same_calls(calls_of(message), calls_of(turn.served)):
        return EDITED
    return REWRITTEN


def reason_for_root(messages: Sequence[Message], tools: Tools, roots: Sequence[SessionTurn]) -> str:
    """Why a request with these messages starts anew beside the roots of its session."""
    same_tools = [root for root in roots if root.tools == tools]
    if reason := reason_beside(messages, same_tools):
        return reason
    others = (root for root in roots if root.tools != tools)
    if any(_says_more(messages[: common_length(messages, root.given)]) for root in others):
        return TOOLS
    if any(_differs_in_system(messages, root.given) for root in same_tools):
        return SYSTEM
    return NEW


def _differs_in_system(messages: Sequence[Message], given: Sequence[Message]) -> bool:
    one, other = _without_system(messages), _without_system(given)
    return common_length(one, other) > 0


def _without_system(messages: Iterable[Message]) -> list[Message]:
    return [message for message in messages if not _is_system(message)]


def _says_more(messages: Iterable[Message]) -> bool:
    """Whether there is more than system messages, which other conversations share."""
    return any(not _is_system(message) for message in messages)


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def common_length(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages are the same at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    shortest = min(len(one), len(other))
    return next((place for place, (a, b) in pairs if not same_given(a, b)), shortest)
