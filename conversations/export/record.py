"""Plain Parquet: the whole record, in the columns of `conversations.arrow`. Lossless."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from conversations import arrow
from conversations.export.formats import Format, Record, Source
from conversations.extras import parquet

FILE = "trajectories.parquet"


def _rows(source: Source) -> Iterator[Record]:
    return iter(source)


def _write(rows: Iterator[Record], folder: Path) -> int:
    count = 0
    with parquet().ParquetWriter(folder / FILE, arrow.schema(), compression="zstd") as out:
        for batch in arrow.batches(rows):
            out.write_batch(batch)
            count += batch.num_rows
    return count


PARQUET = Format(
    name="parquet",
    consumer="pandas, DuckDB, Polars, datasets",
    rows=_rows,
    write=_write,
    unit="trajectory",
    fields={
        "prompt_ids, response_ids, response_mask, response_logprobs": "the tokens, exactly; "
        "the mask is 1 where the engine sampled",
        "segments, turns": "who wrote which tokens; "
        "each generation's span, finish reason and times",
        ", ".join(arrow.JSON_COLUMNS): "JSON text",
        "(others)": "as in the record",
    },
    takes_images=True,
    usage=f'pandas.read_parquet("{FILE}")',
)
