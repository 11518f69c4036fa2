"""Where two records of one conversation first differ, in the order in which it happened.

Invariant: whatever is not listed in `NOT_COMPARED`, or in the list of a part that was live, counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from conversations.branches import first_turn, is_aside, path_of
from conversations.checks.finding import first_difference
from conversations.trajectory import ToolCallRecord, Trajectory, Turn, canonical_json

NOT_COMPARED = {
    "trajectory": frozenset({"id", "sample", "parent", "started_at", "wall_s"}),
    "turn": frozenset({"cached_tokens", "queue_s", "engine_s"}),
    "call": frozenset({"attempts", "queue_s", "run_s"}),
}
"""Clocks, caches and names differ between equal conversations (and with them `sha256`)."""

LIVE_MODEL = {
    "trajectory": frozenset({"engine", "sampling", "response_logprobs", "warnings"}),
    "turn": frozenset({"weight_version", "resumed"}),
    "call": frozenset[str](),
}
"""What today's engine may report differently although it samples the same tokens."""

LIVE_TOOLS = {
    "trajectory": frozenset({"error", "warnings"}),
    "turn": frozenset[str](),
    "call": frozenset({"error"}),
}
"""What today's tools may note differently although they answer the same."""

ANSWER = ("status", "response", "full_response", "reward", "metrics")
"""The fields of the ledger that hold a tool's answer."""

CLOCK_METRIC = re.compile(r"(^|_)(time|duration|elapsed|latency|seconds|s|ms)$")
"""Metrics with such a name are measured times, which are never the same twice."""

CONTEXT = 24
"""Tokens shown on each side of a difference."""
CLIP = 2000
"""Characters kept of a text that differs."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two records first differ.

    `kind`: prompt, sampled, logprob, turn, call, answer, delta (what was appended after a turn),
    end, or record (a field of the record alone). `token` is an index into
    `prompt_ids + response_ids`. `recorded` and `replayed` are JSON: for tokens {ids, text, logprob}
    from the token on, with `before`, the text they share; for answers the fields that differ.
    `branch` is the sequence of a session, whose turns and tokens count along its path.
    """

    kind: str
    turn: int | None = None
    token: int | None = None
    call_id: str | None = None
    name: str | None = None
    before: str | None = None
    recorded: Any = None
    replayed: Any = None
    branch: int | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """What a comparison is about: which parts were live; `decode` turns ids into text."""

    live_model: bool
    live_tools: bool
    decode: Decode

    def compares(self, what: str, name: str) -> bool:
        """Whether a field of a `trajectory`, a `turn` or a `call` counts."""
        lists = [
            NOT_COMPARED,
            *([LIVE_MODEL] if self.live_model else []),
            *([LIVE_TOOLS] if self.live_tools else []),
        ]
        return not any(name in names[what] for names in lists)


@dataclass(slots=True)
class Answers:
    """How many answers of a tool were compared, how many differed, and in what."""

    compared: int = 0
    different: int = 0
    fields: list[str] = field(default_factory=list)

    def count(self, difference: dict[str, Any]) -> None:
        """Counts one answer; `difference` is what `answer_difference` returned."""
        self.compared += 1
        self.different += bool(difference)
        self.fields += [name for name in difference if name not in self.fields]


def index_of_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first index at which two sequences differ, an end included; None if they are equal."""
    return None if one == other else first_difference(one, other)


def compare_records(recorded: Trajectory, replayed: Trajectory, scope: Scope) -> Divergence | None:
    """The first difference, None if the records are the same.

    In a session the sequences are compared in their order, each along its path, then the fields.
    """
    if scope.live_model and not scope.live_tools:  # what tools asked was not asked again
        recorded, replayed = _without_asides(recorded), _without_asides(replayed)
    if not recorded.branches and not replayed.branches:
        return next(_differences(recorded, replayed, scope), None)
    count = min(len(recorded.branches), len(replayed.branches)) + 1
    fields: Divergence | None = None
    for number in range(count):
        one, other = path_of(recorded, number), path_of(replayed, number)
        own = first_turn(recorded, number)
        for found in _differences(one, other, scope):
            if found.kind == "record":
                fields = fields or found
            elif found.turn is None or found.turn >= own:
                return dataclasses.replace(found, branch=number)
    if len(recorded.branches) != len(replayed.branches):
        sizes = len(recorded.branches), len(replayed.branches)
        return Divergence("end", recorded=sizes[0], replayed=sizes[1], branch=count)
    return fields


def _without_asides(record: Trajectory) -> Trajectory:
    kept = [branch for branch in record.branches if not is_aside(branch)]
    return dataclasses.replace(record, branches=kept)


def answer_difference(recorded: ToolCallRecord, replayed: ToolCallRecord) -> dict[str, Any]:
    """{field: [recorded, replayed]} of each field in which two answers to one call differ."""
    pairs = {name: (_answer(recorded, name), _answer(replayed, name)) for name in ANSWER}
    return {name: _clipped_pair(*pair) for name, pair in pairs.items() if _differ(*pair)}


def compared_answers(
    recorded: Trajectory, replayed: Trajectory
) -> Iterator[tuple[ToolCallRecord, ToolCallRecord]]:
    """The pairs of answers to the same call, up to the first call that differs."""
    for old, new in zip(recorded.tool_calls, replayed.tool_calls, strict=False):
        if not calls_match(old, new) or "cancelled" in (old.status, new.status):
            return
        yield old, new


def calls_match(one: ToolCallRecord, other: ToolCallRecord) -> bool:
    """Whether these are the same call at the same place."""
    return (
        one.call_id == other.call_id
        and one.name == other.name
        and not _differ(one.arguments, other.arguments)
    )


def logprob_difference(recorded: Trajectory, replayed: Trajectory) -> float | None:
    """The largest difference between log-probs of the same sampled tokens; None without any."""
    old, new = recorded.response_ids, replayed.response_ids
    if index_of_difference(recorded.prompt_ids, replayed.prompt_ids) is not None:
        return None
    same = index_of_difference(old, new)
    pairs = list(zip(recorded.response_logprobs, replayed.response_logprobs, strict=False))[:same]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=None)


# ---------------------------------------------------------------------- in order


def _differences(recorded: Trajectory, replayed: Trajectory, scope: Scope) -> Iterator[Divergence]:
    old, new = _Side(recorded), _Side(replayed)
    yield from _tokens(
        "prompt",
        None,
        old,
        new,
        (0, len(recorded.prompt_ids)),
        (0, len(replayed.prompt_ids)),
        scope,
    )
    ends = len(recorded.prompt_ids), len(replayed.prompt_ids)
    for number, (one, other) in enumerate(zip_longest(recorded.turns, replayed.turns)):
        if one is None or other is None:
            break
        yield from _tokens(
            "delta", number, old, new, (ends[0], one.start), (ends[1], other.start), scope
        )
        yield from _turn(number, one, other, old, new, scope)
        yield from _calls(number, old, new, scope)
        ends = one.end, other.end
    yield from _tokens(
        "delta", None, old, new, (ends[0], len(old.ids)), (ends[1], len(new.ids)), scope
    )
    yield from _end(recorded, replayed)
    yield from _fields(recorded, replayed, scope)


class _Side:
    """One record, with its tokens in one list and its calls by turn."""

    def __init__(self, record: Trajectory) -> None:
        self.record = record
        self.ids = record.prompt_ids + record.response_ids
        self.calls: dict[int, list[ToolCallRecord]] = {}
        for line in record.tool_calls:
            self.calls.setdefault(line.turn, []).append(line)

    def logprob(self, token: int) -> float | None:
        index = token - len(self.record.prompt_ids)
        return (
            self.record.response_logprobs[index]
            if 0 <= index < len(self.record.response_logprobs)
            else None
        )

    def shown(self, token: int, end: int, decode: Decode) -> dict[str, Any]:
        ids = self.ids[token : min(end, token + CONTEXT)]
        return {"ids": ids, "text": decode(ids), "logprob": self.logprob(token) if ids else None}


def _tokens(
    kind: str,
    turn: int | None,
    old: _Side,
    new: _Side,
    span: tuple[int, int],
    other: tuple[int, int],
    scope: Scope,
) -> Iterator[Divergence]:
    at = index_of_difference(old.ids[slice(*span)], new.ids[slice(*other)])
    if at is None:
        return
    token = span[0] + at
    before = scope.decode(old.ids[max(0, token - CONTEXT) : token])
    shown = old.shown(token, span[1], scope.decode), new.shown(token, other[1], scope.decode)
    yield Divergence(kind, turn, token, before=before, recorded=shown[0], replayed=shown[1])


def _turn(
    number: int, one: Turn, other: Turn, old: _Side, new: _Side, scope: Scope
) -> Iterator[Divergence]:
    yield from _tokens(
        "sampled", number, old, new, (one.start, one.end), (other.start, other.end), scope
    )
    if not scope.live_model:
        for token in range(one.start, one.end):
            if old.logprob(token) != new.logprob(token):
                yield Divergence(
                    "logprob",
                    number,
                    token,
                    recorded=old.logprob(token),
                    replayed=new.logprob(token),
                )
    for name in (each.name for each in dataclasses.fields(Turn)):
        if scope.compares("turn", name) and getattr(one, name) != getattr(other, name):
            yield Divergence(
                "turn",
                number,
                one.start,
                name=name,
                recorded=getattr(one, name),
                replayed=getattr(other, name),
            )


def _calls(number: int, old: _Side, new: _Side, scope: Scope) -> Iterator[Divergence]:
    for one, other in zip_longest(old.calls.get(number, ()), new.calls.get(number, ())):
        found = one or other
        if one is None or other is None or not calls_match(one, other):
            yield Divergence(
                "call",
                number,
                call_id=found.call_id,
                name=found.name,
                recorded=_call(one),
                replayed=_call(other),
            )
        elif difference := answer_difference(one, other):
            sides = [{name: pair[side] for name, pair in difference.items()} for side in (0, 1)]
            yield Divergence(
                "answer",
                number,
                call_id=one.call_id,
                name=one.name,
                recorded=sides[0],
                replayed=sides[1],
            )
        elif scope.compares("call", "error") and one.error != other.error:
            yield Divergence(
                "record",
                number,
                call_id=one.call_id,
                name="error",
                recorded=one.error,
                replayed=other.error,
            )


def _end(recorded: Trajectory, replayed: Trajectory) -> Iterator[Divergence]:
    """How the conversations ended. If the replay had to stop, its `error` says why."""
    one, other = (
        {"stop_reason": record.stop_reason, "turns": record.num_turns}
        for record in (recorded, replayed)
    )
    if one != other:
        errors = [
            {"error": record.error} if record.error else {} for record in (recorded, replayed)
        ]
        yield Divergence(
            "end",
            min(recorded.num_turns, replayed.num_turns),
            recorded={**one, **errors[0]},
            replayed={**other, **errors[1]},
        )


def _fields(recorded: Trajectory, replayed: Trajectory, scope: Scope) -> Iterator[Divergence]:
    done = ("turns", "tool_calls")
    for name in (each.name for each in dataclasses.fields(Trajectory) if each.name not in done):
        one, other = getattr(recorded, name), getattr(replayed, name)
        if name == "warnings":  # neither their order nor their wording counts
            one, other = (sorted(warning.kind for warning in side) for side in (one, other))
        if scope.compares("trajectory", name) and _differ(one, other):
            yield Divergence("record", None, None, None, name, None, *_clipped_pair(one, other))


def _call(line: ToolCallRecord | None) -> dict[str, Any] | None:
    return (
        None
        if line is None
        else {"name": line.name, "arguments": _clipped_pair(line.arguments, line.arguments)[0]}
    )


def _answer(line: ToolCallRecord, name: str) -> Any:
    value = getattr(line, name)
    return (
        {key: item for key, item in value.items() if not CLOCK_METRIC.search(key)}
        if name == "metrics"
        else value
    )


def _differ(one: Any, other: Any) -> bool:
    """Whether the JSON differs: 1, 1.0 and True are three values, a tuple is a list."""
    return one is not other and canonical_json(one) != canonical_json(other)


def _clipped_pair(one: Any, other: Any) -> list[Any]:
    """Both values; long ones as a piece of text around the difference."""
    texts = [value if isinstance(value, str) else canonical_json(value) for value in (one, other)]
    start = max(0, (index_of_difference(*texts) or 0) - CLIP // 4)
    return [
        value
        if len(text) <= CLIP
        else f"{'... ' if start else ''}{text[start : start + CLIP]} ... [{len(text)} characters]"
        for value, text in zip((one, other), texts, strict=True)
    ]
