"""The sequences of a session for its record: a trunk, and branches that hold what is their own.

The trunk is the root with most turns below it, among equals the first. Along a path, the child with
most turns below it continues the sequence; the others begin branches. So each sampled token stands
in exactly one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conversations.images.sources import hash_of
from conversations.messages import MalformedToolCall, Message, content_text, image_parts
from conversations.session.turn import SessionTurn, record_messages
from conversations.tokens import TokenSequence
from conversations.trajectory import Branch, ToolCallRecord, Turn


def branches_of(roots: Sequence[SessionTurn]) -> list[Branch]:
    """The sequences of the turns below `roots`, the trunk first; [] if there are none.

    A parent stands before its branches. The trunk's own `reason` says nothing: it is none.
    """
    below = _turns_below(roots)
    paths = list(_paths(roots, below))
    numbers = {turn: number for number, path in enumerate(paths) for turn in path}
    departures = _departures(roots, below)
    return [_branch(path, numbers, departures.get(path[0], "new")) for path in paths]


def _turns_below(roots: Sequence[SessionTurn]) -> dict[SessionTurn, int]:
    """How many turns stand at and below each turn."""
    below: dict[SessionTurn, int] = {}
    order = list(roots)
    for turn in order:  # grows while it is read: parents before children
        order += turn.children
    for turn in reversed(order):
        below[turn] = 1 + sum(below[child] for child in turn.children)
    return below


def _main(children: Sequence[SessionTurn], below: Mapping[SessionTurn, int]) -> SessionTurn:
    return max(children, key=lambda turn: (below[turn], -turn.number))


def _paths(
    roots: Sequence[SessionTurn], below: Mapping[SessionTurn, int]
) -> Iterator[list[SessionTurn]]:
    """The turns of each sequence: the trunk's, then the others' in the order of their first."""
    if not roots:
        return
    trunk = _main(roots, below)
    heads = [root for root in roots if root is not trunk]
    paths = []
    pending = [trunk, *heads]
    for head in pending:  # grows while it is read
        path = [head]
        while path[-1].children:
            main = _main(path[-1].children, below)
            pending += [child for child in path[-1].children if child is not main]
            path.append(main)
        paths.append(path)
    yield paths[0]
    yield from sorted(paths[1:], key=lambda path: path[0].number)


def _departures(
    roots: Sequence[SessionTurn], below: Mapping[SessionTurn, int]
) -> dict[SessionTurn, str]:
    """Why each turn stands beside the one that continues the sequence.

    The later of two has the reason: if it is the one that goes on, the earlier one is left with it.
    """
    reasons: dict[SessionTurn, str] = {}
    for siblings in (roots, *(turn.children for turn in below)):
        if not siblings:
            continue
        main = _main(siblings, below)
        for turn in siblings:
            later = turn if turn.number > main.number else main
            reasons[turn] = later.reason or turn.reason or "new"
    return reasons


def _branch(path: list[SessionTurn], numbers: Mapping[SessionTurn, int], reason: str) -> Branch:
    tokens = TokenSequence()
    turns: list[Turn] = []
    messages: list[Message] = []
    calls: list[ToolCallRecord] = []
    images: list[dict[str, Any]] = []
    before = path[0].parent
    shift = before.end if before else 0
    for place, turn in enumerate(path):
        following = path[place + 1].given if place + 1 < len(path) else []
        for kind, run in turn.pieces:
            tokens.append(kind, run.ids)
        start = len(tokens)
        tokens.append_sampled(turn.sampled.ids, turn.logprobs.tolist())
        turns.append(_turn(turn, start, len(tokens)))
        messages += [*record_messages(turn.given, turn.parent), turn.message]
        calls += _ledger(turn, following)
        images += [
            {**image, "start": image["start"] - shift, "end": image["end"] - shift}
            for image in turn.images
        ]
    parent = {"branch": numbers[before], "turn": path[0].index} if before else None
    return Branch(
        parent=parent,
        reason=reason,
        client=dict(path[0].client),
        **tokens.columns(),
        turns=turns,
        messages=messages,
        tool_calls=calls,
        tools=path[0].tools,
        images=images,
    )


def _images_of(content: Any) -> list[str]:
    """The hashes of a content's images."""
    return [hash_of(part["image"]) for part in image_parts([{"content": content}])]


def _turn(turn: SessionTurn, start: int, end: int) -> Turn:
    return Turn(
        start=start,
        end=end,
        finish_reason=turn.finish_reason,
        prompt_tokens=turn.start,
        cached_tokens=turn.cached_tokens,
        queue_s=turn.queue_s,
        engine_s=turn.engine_s,
        weight_version=turn.weight_version,
        response_id=turn.response_id,
        asked=dict(turn.asked),
        notes=list(turn.notes),
    )


def _ledger(turn: SessionTurn, following: Sequence[Message]) -> list[ToolCallRecord]:
    """A line for each call of a turn; its response is what the client sent for it."""
    names = {tool["function"]["name"] for tool in turn.tools}
    answers = {
        message["tool_call_id"]: message["content"]
        for message in record_messages(following, turn)
        if message["role"] == "tool" and "tool_call_id" in message
    }
    lines = []
    for place, call in enumerate(turn.calls):
        call_id = f"call_{turn.index}_{place}"
        response = answers.get(call_id)
        if isinstance(call, MalformedToolCall):
            arguments: dict[str, Any] | str = call.raw
            status, error = "malformed", call.error
        else:
            arguments, error = call.arguments, None
            answered = "external" if response is not None else "cancelled"
            status = answered if call.name in names else "unknown_tool"
        lines.append(
            ToolCallRecord(
                call_id,
                turn.index,
                call.name or "",
                arguments,
                status,
                None if response is None else content_text(response, ""),
                error=error,
                images=_images_of(response),
            )
        )
    return lines
