"""Rows to files: JSON Lines, or Parquet with a known schema or one that the rows decide.

Memory holds one batch of rows. Parquet is compressed with zstd. A value that has no single Arrow
type, such as a number in one row and a text in another, becomes JSON text.

Text for trainers is Unicode: half a surrogate pair becomes U+FFFD, in every such format alike. Only
an `exact` writer keeps it, as JSON can.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from conversations.errors import ExportError
from conversations.extras import parquet, pyarrow
from conversations.unicode import unicode_only

Row = dict[str, Any]
BATCH = 256
"""Rows in memory at a time, and in a row group."""


def write_json_lines(name: str, *, exact: bool = False) -> Callable[[Iterator[Row], Path], int]:
    """A writer of one JSON object a line into the file `name`."""

    def write(rows: Iterator[Row], folder: Path) -> int:
        count = 0
        with (folder / name).open("w", encoding="ascii") as out:
            for row in rows:
                text = json_text(row)
                if not exact and "\\ud" in text:  # most are whole pairs
                    text = json_text(unicode_only(row))
                out.write(text + "\n")
                count += 1
        return count

    return write


def json_text(value: Any) -> str:
    """The value as JSON. Raises ExportError if it has no JSON form, such as NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"a row cannot be written as JSON: {error}") from error


def write_parquet(name: str, schema: Callable[[], Any]) -> Callable[[Iterator[Row], Path], int]:
    """A writer of the Parquet file `name`; `schema` gives its `pyarrow.Schema`."""

    def write(rows: Iterator[Row], folder: Path) -> int:
        return _parquet(rows, folder / name, schema())

    return write


def origin_columns(pa: Any) -> list[tuple[str, Any]]:
    """The columns of `formats.origin`, in its order."""
    return [("id", pa.string()), ("branch", pa.int32()), ("reason", pa.string())]


def write_shaped_parquet(name: str) -> Callable[[Iterator[Row], Path], int]:
    """A writer of the Parquet file `name` whose schema has the keys of all rows.

    A key that a row does not have is null there.
    """

    def write(rows: Iterator[Row], folder: Path) -> int:
        scratch = folder / (name + ".rows")
        count = write_json_lines(scratch.name)(rows, folder)
        shape: Any = None
        for row in _read(scratch):
            shape = merged(shape, shape_of(row))
        written = _parquet(
            (fitted(row, shape) for row in _read(scratch)), folder / name, arrow_schema(shape)
        )
        scratch.unlink()
        assert written == count
        return count

    return write


def _read(file: Path) -> Iterator[Row]:
    with file.open(encoding="ascii") as lines:
        yield from map(json.loads, lines)


def _parquet(rows: Iterator[Row], file: Path, schema: Any) -> int:
    pa = pyarrow()
    count = 0
    with parquet().ParquetWriter(file, schema, compression="zstd") as out:
        while chunk := list(islice(rows, BATCH)):
            try:
                out.write_batch(_batch(chunk, schema))
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise ExportError(
                    f"rows {count} to {count + len(chunk) - 1} do not fit the format: {error}"
                ) from error
            count += len(chunk)
    return count


def _batch(rows: list[Row], schema: Any) -> Any:
    pa = pyarrow()
    try:
        return pa.RecordBatch.from_pylist(rows, schema=schema)
    except UnicodeEncodeError:
        return pa.RecordBatch.from_pylist([unicode_only(row) for row in rows], schema=schema)


# ---------------------------------------------------------------------- the shape of JSON values

Shape = Any
"""None (null only), "bool", "int", "float", "text", ["list", shape] or {key: shape}."""


def shape_of(value: Any) -> Shape:
    """The shape of a JSON value."""
    if isinstance(value, Mapping):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        inner: Shape = None
        for item in value:
            inner = merged(inner, shape_of(item))
        return ["list", inner]
    if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 63:
        return "text"
    return {type(None): None, bool: "bool", int: "int", float: "float"}.get(type(value), "text")


def merged(one: Shape, other: Shape) -> Shape:
    """A shape that both fit, "text" if there is no other."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: merged(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return ["list", merged(one[1], other[1])]
    if one == other:
        return one
    return "float" if {repr(one), repr(other)} == {"'int'", "'float'"} else "text"


def fitted(value: Any, shape: Shape) -> Any:
    """The value as it stands in a column of that shape."""
    if value is None or shape is None or shape == {}:
        return None
    if isinstance(shape, dict):
        return {key: fitted(value[key], inner) for key, inner in shape.items() if key in value}
    if isinstance(shape, list):
        return [fitted(item, shape[1]) for item in value]
    if shape == "text":
        return value if isinstance(value, str) else json_text(value)
    return float(value) if shape == "float" else value


def arrow_schema(shape: Shape) -> Any:
    """The `pyarrow.Schema` of rows of that shape."""
    pa = pyarrow()
    return pa.schema([(key, _arrow_type(inner, pa)) for key, inner in (shape or {}).items()])


def _arrow_type(shape: Shape, pa: Any) -> Any:
    if isinstance(shape, dict) and shape:  # Parquet has no struct without fields
        return pa.struct([(key, _arrow_type(inner, pa)) for key, inner in shape.items()])
    if isinstance(shape, list):
        return pa.list_(_arrow_type(shape[1], pa))
    if not shape:
        return pa.null()
    return {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}[
        shape
    ]
