"""The sequences of a record: the trunk, number 0, and its branches, from number 1.

A branch holds what is its own. `path_of` puts the parents' part before it: a record of one
conversation, which can be checked and shown like any other. `rows` are what trainers want: each
sampled token has mask 1 in exactly one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conversations.errors import RecordError
from conversations.messages import Message
from conversations.rounds import first_sampled, sampled_places
from conversations.tokens import PROMPT
from conversations.trajectory import INVALID_STATUSES, Branch, ToolCallRecord, Trajectory, Turn


def sequences(record: Trajectory) -> list[Trajectory | Branch]:
    """The trunk, then the branches, by number. All have tokens, turns, messages and a ledger."""
    return [record, *record.branches]


def is_aside(branch: Branch) -> bool:
    """Whether a tool's call asked the model for it: its `client` names tool, call and sequence."""
    return "call" in branch.client


def last_of_conversation(record: Trajectory) -> int:
    """The number of the sequence that a conversation ended with: tools' own are not meant."""
    numbers = range(len(record.branches), 0, -1)
    return next((n for n in numbers if not is_aside(record.branches[n - 1])), 0)


def first_turn(record: Trajectory, number: int) -> int:
    """The place of a sequence's first own turn along its path: 0 if it starts anew."""
    parent = record.branches[number - 1].parent if number else None
    return parent["turn"] if parent else 0


def check_parents(record: Trajectory) -> None:
    """Raises RecordError, naming the branch, if a parent does not stand before its branch."""
    for number, branch in enumerate(record.branches, 1):
        parent = branch.parent
        if parent is None:
            continue
        place = parent["branch"]
        if not 0 <= place < number:
            raise RecordError(
                f"branch {number} has parent {place}, expected a sequence below {number}"
            )
        first = first_turn(record, place)
        last = first + len(sequences(record)[place].turns)
        if not first < parent["turn"] <= last:
            raise RecordError(
                f"branch {number} departs at turn {parent['turn']} of sequence {place}, "
                f"expected {first + 1} to {last}"
            )


def path_of(record: Trajectory, number: int) -> Trajectory:
    """A sequence with everything before it, as a record of one conversation without branches.

    Its other fields are the session's. The turns of the path come first: `first_turn` are not its
    own. Raises RecordError if the parents do not fit.
    """
    check_parents(record)
    own = sequences(record)[number]
    parts = list(_parts(record, number))
    first = parts[0][0]
    length = len(first.prompt_ids)
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float | None] = []
    segments: list[tuple[str, int, int]] = []
    turns: list[Turn] = []
    messages: list[Message] = []
    calls: list[ToolCallRecord] = []
    images: list[dict[str, Any]] = []
    for sequence, count in parts:
        end = _end_of(sequence, count)
        shift, prompt = len(ids), len(sequence.prompt_ids)
        ids += (sequence.prompt_ids + sequence.response_ids)[:end]
        mask += ([0] * prompt + sequence.response_mask)[:end]
        logprobs += ([None] * prompt + sequence.response_logprobs)[:end]
        _add_segments(segments, sequence.segments, shift, end)
        turns += [
            replace(turn, start=turn.start + shift, end=turn.end + shift)
            for turn in sequence.turns[:count]
        ]
        messages += _messages_of(sequence, count)
        images += [
            {**image, "start": image["start"] + shift, "end": image["end"] + shift}
            for image in sequence.images
            if image["end"] <= end
        ]
        calls += [line for line in sequence.tool_calls if line.turn < len(turns)]
    return replace(
        record,
        prompt_ids=ids[:length],
        response_ids=ids[length:],
        response_mask=mask[length:],
        response_logprobs=logprobs[length:],
        segments=segments,
        turns=turns,
        messages=messages,
        tool_calls=calls,
        tools=own.tools,
        num_turns=len(turns),
        branches=[],
        images=images,
    )


def _parts(record: Trajectory, number: int) -> Iterator[tuple[Trajectory | Branch, int | None]]:
    """The sequences along a path, root first, each with how many of its own turns belong to it."""
    parts: list[tuple[Trajectory | Branch, int | None]] = []
    place, until = number, None
    while True:
        count = None if until is None else until - first_turn(record, place)
        parts.append((sequences(record)[place], count))
        parent = record.branches[place - 1].parent if place else None
        if parent is None:
            break
        place, until = parent["branch"], parent["turn"]
    yield from reversed(parts)


def _end_of(sequence: Trajectory | Branch, count: int | None) -> int:
    """The token after a sequence's first `count` turns; all of its tokens if that is None."""
    if count is None:
        return len(sequence.prompt_ids) + len(sequence.response_ids)
    return sequence.turns[count - 1].end


def _messages_of(sequence: Trajectory | Branch, count: int | None) -> list[Message]:
    if count is None:
        return sequence.messages
    places = sampled_places(sequence.messages)
    return sequence.messages[: places[count - 1] + 1] if count <= len(places) else sequence.messages


def _add_segments(
    segments: list[tuple[str, int, int]],
    added: Sequence[tuple[str, int, int]],
    shift: int,
    length: int,
) -> None:
    for kind, start, end in added:
        if start >= length:
            break
        segments.append((kind, start + shift, min(end, length) + shift))


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """One sequence of a record for training: what stands before its first own turn is the prompt.

    `trajectory` is a record of one conversation: in it the parents' turns are given, not sampled,
    so that each sampled token of the session is trained in one row. `branch` is its number, 0 for
    the trunk, `reason` why it is a branch, None for the trunk.
    """

    branch: int
    reason: str | None
    trajectory: Trajectory


def rows(record: Trajectory) -> Iterator[SequenceRow]:
    """A row for each sequence, the trunk first. Raises RecordError if the branches do not fit."""
    yield SequenceRow(0, None, replace(record, branches=[]) if record.branches else record)
    for number, branch in enumerate(record.branches, 1):
        yield SequenceRow(number, branch.reason, own_part(record, number))


def own_part(record: Trajectory, number: int) -> Trajectory:
    """A branch as a conversation of its own: its path is its prompt, what follows is sampled."""
    whole, skipped = path_of(record, number), first_turn(record, number)
    own = sequences(record)[number]
    if not skipped:
        return whole
    begin = whole.turns[skipped].start if len(whole.turns) > skipped else len(whole.prompt_ids)
    ids = whole.prompt_ids + whole.response_ids
    begun = len(whole.messages) - len(own.messages)
    after: list[tuple[str, int, int]] = []
    path = len(ids) - len(own.prompt_ids) - len(own.response_ids)
    _add_segments(after, own.segments, path, len(ids))
    return replace(
        whole,
        prompt_ids=ids[:begin],
        response_ids=ids[begin:],
        response_mask=own.response_mask,
        response_logprobs=own.response_logprobs,
        segments=[(PROMPT, 0, begin), *(part for part in after if part[1] >= begin)],
        turns=whole.turns[skipped:],
        messages=[*map(_given, whole.messages[:begun]), *own.messages],
        tool_calls=[replace(line, turn=line.turn - skipped) for line in own.tool_calls],
        num_turns=len(own.turns),
    )


def _given(message: Message) -> Message:
    """A message of the path: what was sampled there is given here."""
    return {**message, "raw": None} if message["role"] == "assistant" else message


def sequence_records(record: dict[str, Any], *, with_branches: bool) -> Iterator[dict[str, Any]]:
    """A record's dict for each of its sequences, with `branch` and `reason` beside the fields.

    Raises RecordError if the branches do not fit. Without `with_branches` the trunk alone.
    """
    if not record["branches"] or not with_branches:
        yield {**record, "branches": [], "branch": 0, "reason": None}
        return
    for row in rows(Trajectory.from_record(record)):
        yield {**record, **row.trajectory.fields(), "branch": row.branch, "reason": row.reason}


def path_record(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The dict of `path_of`, for what reads records as dicts. Raises RecordError."""
    return {**record, **path_of(Trajectory.from_record(record), number).fields()}


@dataclass(frozen=True, slots=True)
class TreeLine:
    """One sequence in the tree of a record: the trunk has depth 0, what starts anew has 1.

    `turn` is the turn of the parent after which it departs, counted along the path from 1; None if
    it starts anew.
    """

    number: int
    depth: int
    parent: int | None
    turn: int | None
    reason: str | None
    turns: int
    sampled: int
    preview: str

    @property
    def summary(self) -> str:
        """What the line says after number and reason."""
        place = f"after turn {self.turn} of {self.parent}, " if self.turn is not None else ""
        turns = f"{self.turns} turn{'s' if self.turns != 1 else ''}"
        said = f": {self.preview}" if self.preview else ""
        return f"{place}{turns}, {self.sampled} sampled tokens{said}"


def branch_tree(record: Mapping[str, Any]) -> list[TreeLine]:
    """The sequences of a record's dict as a tree: each below its parent, roots below the trunk."""
    lines: list[TreeLine] = []
    branches = [dict(branch) for branch in record["branches"]]
    children: dict[int | None, list[int]] = {}
    for number, branch in enumerate(branches, 1):
        parent = branch["parent"]
        above = parent["branch"] if parent and 0 <= parent["branch"] < number else None
        children.setdefault(above, []).append(number)

    pending = [(0, 0)]
    while pending:
        number, depth = pending.pop()
        one: Mapping[str, Any] = branches[number - 1] if number else record
        parent = branches[number - 1]["parent"] if number else None
        below = sorted(children.get(number, []) + (children.get(None, []) if not number else []))
        pending += [(child, depth + 1) for child in reversed(below)]
        lines.append(
            TreeLine(
                number=number,
                depth=depth,
                parent=parent["branch"] if parent else None,
                turn=parent["turn"] if parent else None,
                reason=one["reason"] if number else None,
                turns=len(one["turns"]),
                sampled=sum(one["response_mask"]),
                preview=_preview(one["messages"]),
            )
        )
    return lines


def _preview(messages: Sequence[Mapping[str, Any]]) -> str:
    """The beginning of what was asked last before the first own turn."""
    before = messages[: first_sampled(messages)]
    said = next((str(one["content"]) for one in reversed(before) if one["content"]), "")
    return " ".join(said[:400].split())[:80]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a record has over all of its sequences."""

    turns: int
    tokens: int
    sampled_tokens: int
    tool_calls: int
    tool_errors: int
    invalid_calls: int

    @classmethod
    def of(cls, record: Trajectory) -> Totals:
        """Counts the trunk and the branches."""
        parts = sequences(record)
        statuses = Counter(line.status for part in parts for line in part.tool_calls)
        calls = statuses.total()
        return cls(
            turns=sum(len(part.turns) for part in parts),
            tokens=sum(len(part.prompt_ids) + len(part.response_ids) for part in parts),
            sampled_tokens=sum(turn.end - turn.start for part in parts for turn in part.turns),
            tool_calls=calls,
            tool_errors=calls - statuses["ok"] - statuses["external"],
            invalid_calls=sum(statuses[status] for status in INVALID_STATUSES),
        )
