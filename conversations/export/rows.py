"""Plain rows: ids, masks, log-probs, weight versions, group, reward and advantage in Parquet.

A row is one sequence of a trajectory: the trunk, or a branch of a session. Each sampled token has
`loss_mask` 1 in exactly one row. The columns are lists of equal length, so a trainer needs no
tokenizer. `input_ids` and `assistant_masks` are the names that TRL's SFTTrainer reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conversations.advantages import ADVANTAGES, SavedAdvantages
from conversations.export.formats import Format, Record, Row, Source
from conversations.export.writers import write_parquet
from conversations.extras import pyarrow
from conversations.observations import observation_mask
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory

_NO_ADVANTAGES = (
    f"advantage is null: the run has no {ADVANTAGES}; `turntrace advantages RUN` writes it"
)
_NO_OBSERVATIONS = (
    "observation_mask is null where the chat template does not tell scaffold from answers"
)


def _rows(source: Source) -> Iterator[Row]:
    advantages = SavedAdvantages(source.run.path)
    if not advantages.head:
        source.notes.append(_NO_ADVANTAGES)
    template = source.view.template
    for record in source.with_ids():
        yield _row(record, template, advantages, source)


def _row(
    record: Record,
    template: ChatTemplate | None,
    advantages: SavedAdvantages,
    source: Source,
) -> Row:
    one = Trajectory.from_record(record)
    prompt = len(one.prompt_ids)
    ids, mask = one.prompt_ids + one.response_ids, [0] * prompt + one.response_mask
    observed = None if template is None else observation_mask(one, template)
    if observed is None and _NO_OBSERVATIONS not in source.notes:
        source.notes.append(_NO_OBSERVATIONS)
    return {
        "id": record["id"],
        "group": record["task_id"],
        "sample": record["sample"],
        "branch": record["branch"],
        "reason": record["reason"],
        "input_ids": ids,
        "prompt_length": prompt,
        "loss_mask": mask,
        "assistant_masks": mask,
        "observation_mask": observed,
        "logprobs": [None] * prompt + one.response_logprobs,
        "weight_versions": _versions(one),
        "reward": record["reward"],
        "advantage": advantages.of(record),
    }


def _versions(one: Trajectory) -> list[dict[str, Any]]:
    """[start, end) of sampled tokens with the weights that sampled them, in order."""
    spans: list[dict[str, Any]] = []
    for turn in one.turns:
        starts = [(turn.start, turn.weight_version), *map(tuple, turn.resumed or ())]
        ends = [*(start for start, _ in starts[1:]), turn.end]
        spans += [
            {"start": start, "end": end, "version": version}
            for (start, version), end in zip(starts, ends, strict=True)
            if start < end
        ]
    return spans


def _schema() -> Any:
    pa = pyarrow()
    mask = pa.list_(pa.int8())
    span = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("sample", pa.int32()),
            ("branch", pa.int32()),
            ("reason", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("prompt_length", pa.int32()),
            ("loss_mask", mask),
            ("assistant_masks", mask),
            ("observation_mask", mask),
            ("logprobs", pa.list_(pa.float32())),
            ("weight_versions", pa.list_(span)),
            ("reward", pa.float64()),
            ("advantage", pa.float64()),
        ]
    )


ROWS = Format(
    name="rows",
    consumer="any trainer that takes token ids",
    rows=_rows,
    write=write_parquet("rows.parquet", _schema),
    unit="row",
    fields={
        "input_ids": "prompt and response, the ids that the engine saw and sampled",
        "loss_mask, assistant_masks": "1 exactly where the engine sampled the token; the second is "
        "the name that TRL's SFTTrainer reads",
        "observation_mask": "1 in the body of a tool's answer, the template's scaffold left out",
        "logprobs": "of the sampling distribution, null where nothing was sampled",
        "weight_versions": "spans of sampled tokens and the weights that sampled them",
        "group, sample, branch, prompt_length": "the task, which of its samples, which sequence of "
        "it (0: the trunk), and the tokens before its first sampled one",
        "reason": "why it is a branch, null for the trunk",
        "reward, advantage": "of the trajectory; null where it has none",
        "id": "the trajectory in the run",
    },
    usage='datasets.load_dataset("parquet", data_files="rows.parquet", split="train")',
)
