"""The trajectory record, `turntrace/2`: one finished conversation on one JSON line.

Invariant: `sha256` is the hash of the canonical JSON of all other fields, so a record can be
checked with nothing but a JSON library. The class docstrings say what each field means.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Annotated, Any, get_type_hints

from conversations.errors import RecordError
from conversations.messages import Message
from conversations.number_list import number_list_json
from conversations.upgrade import SCHEMA, as_written, check_schema, upgraded
from conversations.warning import RecordWarning

STOP_REASONS = (
    "stop",
    "tool_stop",
    "length",
    "max_turns",
    "invalid_tool_calls",
    "deadline",
    "cancelled",
    "engine_error",
    "prompt_too_long",
)
CALL_STATUSES = (
    "ok",
    "external",
    "tool_error",
    "backend_error",
    "timeout",
    "unknown_tool",
    "invalid_arguments",
    "malformed",
    "rejected",
    "cancelled",
)
BRANCH_REASONS = (
    "new",
    "tools",
    "system",
    "edited",
    "rewritten",
    "dropped",
    "resampled",
    "template",
)
"""Why a branch does not continue its parent or its session; see `conversations.session.reasons`."""
INVALID_STATUSES = frozenset({"unknown_tool", "invalid_arguments", "malformed"})
"""Statuses of calls that were the model's mistake."""

Ids = Annotated[list[int], "token ids"]
Mask = Annotated[list[int], "0 or 1"]
LogProbs = Annotated[list[float | None], "float32"]
Segments = Annotated[list[tuple[str, int, int]], "[kind, start, end)"]
StopReason = Annotated[str, "one of STOP_REASONS"]
Tools = Annotated[list[dict[str, Any]], "OpenAI tool schemas"]
Parent = Annotated[dict[str, Any] | None, "{run, id, turn}"]
Reason = Annotated[str, "one of BRANCH_REASONS"]
BranchParent = Annotated[dict[str, int] | None, "{branch, turn}"]
Images = Annotated[list[dict[str, Any]], "{sha256, width, height, grid, start, end}"]


@dataclass(slots=True)
class Attempt:
    """One attempt at a call: seconds waited, seconds run, and its outcome.

    The wait includes the pause before a retry, the wait for a free slot and for the tool's rate
    limit. An attempt that never began ran 0 s. `error_class` is the class name of the exception,
    None if there was none. `bytes` is the size of the tool's whole answer in UTF-8, None if there
    was no answer. `tokens_cut` counts the tokens of it that the model does not see, as
    `conversations.truncate.Shortened` does.
    """

    status: str
    queue_s: float
    run_s: float
    error: str | None = None
    error_class: str | None = None
    bytes: int | None = None
    tokens_cut: int = 0


@dataclass(slots=True)
class ToolCallRecord:
    """One line of the ledger. `call_id` is `call_{turn}_{i}`; turns and calls count from 0.

    `arguments` is the parsed object, or the verbatim block of a malformed call. `response` is the
    text that the model was shown, `full_response` the whole text if it was cut, else None. `reward`
    is the step reward that `execute` returned. `attempts` is in order; `queue_s` and `run_s` are
    its sums. `error` is for readers of the record and is never shown to the model. `images` are the
    hashes of the images that the model was shown before the text; a line without any has no such
    key.
    """

    call_id: str
    turn: int
    name: str
    arguments: dict[str, Any] | str
    status: str = "cancelled"
    response: str | None = None
    full_response: str | None = None
    reward: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    queue_s: float = 0.0
    run_s: float = 0.0
    error: str | None = None
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation. `start` and `end` span its sampled tokens over `prompt_ids + response_ids`.

    `resumed` lists where an interrupted turn was resumed: [token index, weight version from there
    on]. `weight_version` is that of the turn's first token, `finish_reason` that of its last part;
    "abort" means that the turn was interrupted and not resumed.

    A turn that was served to a foreign agent has the id that it saw (`response_id`), what it asked
    for and did not get (`asked`), and `notes`: "echo_differs", "reordered", "undelivered". Other
    turns have none of these fields in the record. In a branch, `prompt_tokens` counts the path
    before it too.
    """

    start: int
    end: int
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int | None = None
    queue_s: float | None = None
    engine_s: float | None = None
    weight_version: str | None = None
    resumed: list[list[Any]] | None = None
    response_id: str | None = None
    asked: dict[str, Any] | None = None
    notes: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """A further sequence of a session, with only what is its own; fields as in `Trajectory`.

    Sequences are counted from 0, the trunk: `branches[k - 1]` is number k. `parent` is {branch,
    turn}: the sequence that this one departs from, and the first turn of its own, counted along the
    path from its root: everything before that turn is the parent's. None if it starts anew. Spans
    of segments, turns and images start at 0; the turns of the ledger and of call ids are those of
    the path.
    `reason` is why it is a branch, `client` the hints that the client sent with its first turn.
    """

    parent: BranchParent
    reason: Reason
    client: dict[str, Any]
    prompt_ids: Ids
    response_ids: Ids
    response_mask: Mask
    response_logprobs: LogProbs
    segments: Segments
    turns: list[Turn]
    messages: list[Message]
    tool_calls: list[ToolCallRecord]
    tools: Tools
    images: Images = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A finished conversation. `to_line` and `from_line` are its only way to disk and back.

    `parent` is {run, id, turn} of the trajectory that a replay, a fork or a rescoring was made
    from, else None. In a fork, `turn` is the first turn of its own: everything before
    `turns[turn].start` is the parent's, with the sampled tokens and log-probs. `images` are the
    images of prompt and answers in order: `sha256` names a file of the run's `images/`, `width` and
    `height` are its pixels, `grid` its patches (time, height, width), and [`start`, `end`) its
    tokens over `prompt_ids + response_ids`. A line without images has no such key.
    """

    id: str
    task_id: str
    sample: int
    prompt_ids: Ids
    response_ids: Ids
    response_mask: Mask
    response_logprobs: LogProbs
    segments: Segments
    turns: list[Turn]
    messages: list[Message]
    tool_calls: list[ToolCallRecord]
    tools: Tools
    stop_reason: StopReason
    num_turns: int
    infra_error: bool
    error: str | None
    warnings: list[RecordWarning]
    reward: float | None
    reward_parts: dict[str, Any]
    ground_truth: Any
    data_source: Any
    extra: Any
    engine: dict[str, Any]
    sampling: dict[str, Any]
    parent: Parent
    started_at: str
    wall_s: float
    branches: list[Branch] = field(default_factory=list)
    images: Images = field(default_factory=list)

    def to_line(self) -> str:
        """The record as one JSON line without the newline, `sha256` last.

        Messages and tools keep the order of their keys. Raises RecordError if a value has no JSON
        form (NaN, an object).
        """
        record = as_written({"schema": SCHEMA, **self.fields()})
        try:
            body, line = _texts(record)
        except (TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"trajectory {self.id} cannot be written as JSON: {error}") from error
        return f'{line[:-1]},"sha256":"{_sha256(body)}"}}'

    def fields(self) -> dict[str, Any]:
        """The fields of the record as JSON values, without `schema` and `sha256`."""
        return {name: _plain(getattr(self, name)) for name in _FIELDS}

    @classmethod
    def from_line(cls, line: str) -> Trajectory:
        """Reads a record line. Raises RecordError if its schema, fields or hash are wrong."""
        return cls.from_record(read_record(line))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Trajectory:
        """The trajectory of a dict from `read_record` or `parse_record`.

        Raises RecordError if turns, segments, ledger or warnings are damaged.
        """
        values = {name: record[name] for name in _FIELDS if name != "images"}
        values["images"] = record.get("images", [])  # a line without images has no such key
        try:
            values |= _sequence(record)
            values["branches"] = [
                Branch(**{**branch, **_sequence(branch)}) for branch in record["branches"]
            ]
            values["warnings"] = [RecordWarning(**warning) for warning in record["warnings"]]
        except (TypeError, KeyError) as error:
            raise RecordError(f"trajectory {record['id']} is damaged: {error}") from error
        return cls(**values)


FIELD_TYPES: dict[str, Any] = get_type_hints(Trajectory, include_extras=True)
"""Each field of a record but `schema` and `sha256`, and its type.

Whatever treats all fields, a check of their form, a table's columns, an empty record, goes by these
types: the names are listed in `Trajectory` alone.
"""

_FIELDS = tuple(item.name for item in fields(Trajectory))
_RENDERED = frozenset({"branches", "messages", "tools"})
"""Fields that a chat template sees. It may write a tool as JSON with the keys in their order, so
the line keeps that order: otherwise the prompt could not be rendered from the record. The hash is
of sorted keys, as for all fields.
"""
_NUMBERS = frozenset(name for name, kind in FIELD_TYPES.items() if kind in (Ids, Mask, LogProbs))
_KINDS = {**dict.fromkeys(_RENDERED, "rendered"), **dict.fromkeys(_NUMBERS, "numbers")}


def _canonical_parts(record: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields groups of fields that are written alike, each with its part of the canonical JSON."""
    for kind, names in groupby(sorted(record), _KINDS.get):
        part = {name: record[name] for name in names}
        if kind == "numbers":
            yield (
                part,
                ",".join(f'"{name}":{number_list_json(values)}' for name, values in part.items()),
            )
        else:
            yield part, _encode(part)[1:-1]


def _texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The canonical JSON, and the same with the rendered fields' keys in their own order."""
    canonical, written = [], []
    for part, text in _canonical_parts(record):
        canonical.append(text)
        written.append(text if _RENDERED.isdisjoint(part) else _encode_in_order(part)[1:-1])
    return f"{{{','.join(canonical)}}}", f"{{{','.join(written)}}}"


def canonical_json(value: object) -> str:
    """The JSON text that is hashed.

    Raises TypeError, ValueError or RecursionError if the value has no JSON form.
    """
    return _encode(value)


# A circular value ends in a RecursionError: a check for it would cost time in every record.
_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, check_circular=False
).encode
_encode_in_order = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=True, allow_nan=False, check_circular=False
).encode


def total_reward(parts: Mapping[str, Any]) -> float | None:
    """A trajectory's reward: the sum of its parts, None if there are none.

    A part is a number or, for user turns, a list of numbers.
    """
    if not parts:
        return None
    return float(sum(sum(part) if isinstance(part, list) else part for part in parts.values()))


def record_hash(record: Mapping[str, Any]) -> str:
    """The hash that a record must carry, as its own schema defines it."""
    return line_hash(as_written(record))


def line_hash(line: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all of a line's fields but `sha256`, as they stand there.

    `images` that are empty count as absent: turntrace does not write them.
    """
    absent = ("sha256", "images") if line.get("images") == [] else ("sha256",)
    parts = _canonical_parts({key: value for key, value in line.items() if key not in absent})
    return _sha256(f"{{{','.join(text for _, text in parts)}}}")


def read_record(line: str) -> dict[str, Any]:
    """A record line as a checked dict: JSON, a readable schema, exactly its fields, the right hash.

    The dict has the form of `SCHEMA`; `schema` and `sha256` are those of the line. Raises
    RecordError.
    """
    found = _parsed(line)
    name = f"trajectory {str(found.get('id'))[:200]}"
    try:
        expected = line_hash(found)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} has no canonical JSON: {error}") from error
    if found.get("sha256", expected) != expected:
        raise RecordError(f"{name} does not match its hash: it was changed after it was written")
    return _with_all_fields(upgraded(found))


def parse_record(line: str) -> dict[str, Any]:
    """`read_record` without the check of the hash."""
    return _with_all_fields(upgraded(_parsed(line)))


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a JSON line: {error}") from error
    return check_schema(record)


def _with_all_fields(record: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in (*_FIELDS, "sha256") if name not in record]
    unknown = [name for name in record if name not in (*_FIELDS, "sha256", "schema")]
    if missing or unknown:
        raise RecordError(f"fields missing: {missing}, unknown: {unknown}")
    return record


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _sequence(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record or a branch that are dataclasses or tuples."""
    return {
        "segments": [tuple(segment) for segment in record["segments"]],
        "turns": [Turn(**turn) for turn in record["turns"]],
        "tool_calls": [_read_call(call) for call in record["tool_calls"]],
    }


def _read_call(call: dict[str, Any]) -> ToolCallRecord:
    return ToolCallRecord(
        **{**call, "attempts": [Attempt(**attempt) for attempt in call["attempts"]]}
    )


def _plain(value: Any) -> Any:
    """The record's dataclasses as dicts; other values are JSON already."""
    if isinstance(value, list) and value and isinstance(value[0], _WRITTEN):
        return [_plain_slots(item) for item in value]
    return value


def _plain_slots(item: Any) -> dict[str, Any]:
    kind: Any = type(item)
    is_own = kind is Turn and item.response_id is None and item.notes is None
    names, getter = _own_turn_slots() if is_own else _slots(kind)
    values = dict(zip(names, getter(item), strict=True))
    if "images" in values and not values["images"]:
        del values["images"]
    if kind is ToolCallRecord:
        values["attempts"] = [_plain_slots(attempt) for attempt in values["attempts"]]
    elif kind is Branch:
        return {name: _plain(value) for name, value in values.items()}
    return values


_WRITTEN = (Turn, ToolCallRecord, RecordWarning, Branch)
_SERVED = ("response_id", "asked", "notes")
"""Fields of turns that were served to a foreign agent."""


@functools.cache
def _slots(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a class's slots, and what reads them all at once."""
    return kind.__slots__, operator.attrgetter(*kind.__slots__)


@functools.cache
def _own_turn_slots() -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """Those of a turn that was not served to a foreign agent."""
    names = tuple(name for name in Turn.__slots__ if name not in _SERVED)
    return names, operator.attrgetter(*names)
