"""Trajectories as Arrow tables: tokens as numbers, text as text, anything nested as JSON text.

    prompt_ids, response_ids    list<int32>
    response_mask               list<int8>
    response_logprobs           list<float32>, null where nothing was sampled
    segments                    list<struct<kind: string, start: int32, end: int32>>
    turns                       list<struct<start, end, finish_reason, prompt_tokens,
                                cached_tokens, queue_s, engine_s, weight_version,
                                resumed: list<struct<token: int32, weight_version: string>>>>
    sample, num_turns           int32
    infra_error                 bool
    reward, wall_s              double
    warnings                    list<struct<kind: string, text: string>>
    schema, id, task_id, stop_reason, error, started_at, sha256    string
    messages, tool_calls, tools, reward_parts, ground_truth, data_source, extra, engine,
    sampling, parent, branches, images                             JSON text

JSON text reads back with `json.loads`; it is null if the field is null. Log-probs lose nothing:
they were float32 when they were sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from conversations.errors import RunFolderError
from conversations.extras import pyarrow
from conversations.trajectory import (
    FIELD_TYPES,
    Ids,
    LogProbs,
    Mask,
    Segments,
    StopReason,
    Turn,
)
from conversations.unicode import unicode_only
from conversations.warning import RecordWarning


def _segment(pa: Any) -> Any:
    return pa.struct([("kind", pa.string()), ("start", pa.int32()), ("end", pa.int32())])


def _turn(pa: Any) -> Any:
    text, place, seconds = pa.string(), pa.int32(), pa.float64()
    resumed = pa.list_(pa.struct([("token", place), ("weight_version", text)]))
    fields = [("start", place), ("end", place), ("finish_reason", text), ("prompt_tokens", place)]
    fields += [("cached_tokens", place), ("queue_s", seconds), ("engine_s", seconds)]
    fields += [("weight_version", text), ("resumed", resumed)]
    return pa.struct([*fields, ("response_id", text), ("asked", text), ("notes", pa.list_(text))])


def _warning(pa: Any) -> Any:
    return pa.struct([("kind", pa.string()), ("text", pa.string())])


_TYPES: dict[Any, Callable[[Any], Any]] = {
    Ids: lambda pa: pa.list_(pa.int32()),
    Mask: lambda pa: pa.list_(pa.int8()),
    LogProbs: lambda pa: pa.list_(pa.float32()),
    Segments: lambda pa: pa.list_(_segment(pa)),
    StopReason: lambda pa: pa.string(),
    list[Turn]: lambda pa: pa.list_(_turn(pa)),
    list[RecordWarning]: lambda pa: pa.list_(_warning(pa)),
    int: lambda pa: pa.int32(),
    bool: lambda pa: pa.bool_(),
    float: lambda pa: pa.float64(),
    float | None: lambda pa: pa.float64(),
    str: lambda pa: pa.string(),
    str | None: lambda pa: pa.string(),
}
"""The Arrow type of a column, by the type of its field in `Trajectory`."""

JSON_COLUMNS = tuple(name for name, kind in FIELD_TYPES.items() if kind not in _TYPES)
"""Columns of JSON text: fields without an Arrow type."""
BATCH = 256


def schema(columns: Collection[str] | None = None) -> Any:
    """The `pyarrow.Schema` of the columns in the order given, or of all columns.

    Raises RunFolderError for an unknown column.
    """
    pa = pyarrow()
    known = _columns(pa)
    if unknown := [name for name in columns or () if name not in known]:
        raise RunFolderError(
            f"there is no column {', '.join(map(repr, unknown))}; "
            f"the columns are {', '.join(known)}"
        )
    return pa.schema([(name, known[name]) for name in (known if columns is None else columns)])


def batches(
    records: Iterable[dict[str, Any]], columns: Collection[str] | None = None, *, size: int = BATCH
) -> Iterator[Any]:
    """`pyarrow.RecordBatch`es of `size` records each, made when they are asked for."""
    pa = pyarrow()
    form = schema(columns)
    rest = iter(records)
    while chunk := list(islice(rest, size)):
        try:
            columns_of_chunk = [
                _array([_value(one, name) for one in chunk], form.field(name).type)
                for name in form.names
            ]
            yield pa.RecordBatch.from_arrays(columns_of_chunk, schema=form)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RunFolderError(
                f"trajectories {chunk[0]['id']} to {chunk[-1]['id']} do not fit a table: {error}"
            ) from error


def table(records: Iterable[dict[str, Any]], columns: Collection[str] | None = None) -> Any:
    """All records as one `pyarrow.Table`."""
    pa = pyarrow()
    return pa.Table.from_batches(batches(records, columns), schema(columns))


def _array(values: list[Any], kind: Any) -> Any:
    """A column. Half a surrogate pair becomes U+FFFD: Arrow holds Unicode."""
    pa = pyarrow()
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([unicode_only(value) for value in values], kind)


def _value(record: dict[str, Any], name: str) -> Any:
    value = record[name]
    if name in JSON_COLUMNS:
        return None if value is None else json.dumps(value, ensure_ascii=True)
    if name == "segments":
        return [{"kind": kind, "start": start, "end": end} for kind, start, end in value]
    if name == "turns":
        return [
            {
                **turn,
                "resumed": [
                    {"token": at, "weight_version": version}
                    for at, version in turn.get("resumed") or ()
                ],
                "asked": json.dumps(turn["asked"]) if turn.get("asked") is not None else None,
            }
            for turn in value
        ]
    return value


def _columns(pa: Any) -> dict[str, Any]:
    """The Arrow type of each column, by its name."""
    text = pa.string()
    kinds = {name: _TYPES.get(kind) for name, kind in FIELD_TYPES.items()}
    columns = {name: text if kind is None else kind(pa) for name, kind in kinds.items()}
    return {"schema": text, **columns, "sha256": text}
