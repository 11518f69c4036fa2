"""GSM8K's rows in verl's dataset schema, split into training and held-out problems.

Held out are the rows that the shipped adapter's own training never saw: those kept back by the hash
of their question, and then rows whose worked answer makes no program, in the order of that hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import TaskError
from agent.recipe.data import held_out, read_gsm8k
from agent.recipe.gsm8k import from_gsm8k
from agent.recipe.setups import ANSWER_TOOL, CODE_TOOL

TRAIN_SOURCE, HELD_OUT_SOURCE = "gsm8k", "gsm8k-held-out"
"""`data_source` of a row: it tells training records from validation records in a step's folder."""


@dataclass(frozen=True, slots=True)
class Split:
    """Rows in verl's schema."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def split(path: Path, held_out_count: int) -> Split:
    """The rows of a GSM8K-format file; the order of the file is kept.

    Raises TaskError for a row of another form, and if so many rows cannot be held out.
    """
    rows = list(enumerate(read_gsm8k(path)))
    kept_back = [index for index, row in rows if held_out(row["question"])]
    unseen = [
        index
        for index, row in rows
        if index not in set(kept_back) and from_gsm8k(row["question"], row["answer"]) is None
    ]
    by_hash = sorted(unseen, key=lambda index: _digest(rows[index][1]["question"]))
    chosen = set([*kept_back, *by_hash][:held_out_count])
    if len(chosen) < held_out_count:
        raise TaskError(
            f"{path} has {len(kept_back) + len(unseen)} rows that the adapter never saw, "
            f"{held_out_count} were to be held out; give a smaller --held-out"
        )
    return Split(
        [_row(index, row, TRAIN_SOURCE) for index, row in rows if index not in chosen],
        [_row(index, row, HELD_OUT_SOURCE) for index, row in rows if index in chosen],
    )


def write_verl_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes rows as the Parquet file that verl's dataset reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def _digest(question: str) -> bytes:
    return hashlib.sha256(question.strip().encode()).digest()


def _row(index: int, row: dict[str, str], source: str) -> dict[str, Any]:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    name = f"gsm8k-{index}"
    created = {"create_kwargs": {"ground_truth": answer}}
    return {
        "id": name,
        "data_source": source,
        "prompt": [{"role": "user", "content": row["question"].strip()}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "index": index,
            "id": name,
            "tools_kwargs": {CODE_TOOL: created, ANSWER_TOOL: created},
        },
    }
