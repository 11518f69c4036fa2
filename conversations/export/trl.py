"""TRL: SFT on exact tokens, and preference pairs as text.

SFT rows are tokenised already: `SFTTrainer` uses `input_ids` as they are and makes labels of
`assistant_masks` (TRL 1.16, trainer/sft_trainer.py, `_prepare_dataset`). `DPOTrainer` always
tokenises text, so a pair holds the decoded text of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conversations.export.formats import ORIGIN, Format, Row, Source, origin
from conversations.export.pairs import FIELDS, pairs
from conversations.export.text import TextView, TokensAndMask, after_common, whole_ids, whole_mask
from conversations.export.writers import origin_columns, write_json_lines, write_parquet
from conversations.extras import pyarrow


def _sft_rows(source: Source) -> Iterator[Row]:
    for record in source.with_ids():
        yield {
            **origin(record),
            "input_ids": whole_ids(record),
            "assistant_masks": whole_mask(record),
        }


def _sft_schema() -> Any:
    pa = pyarrow()
    return pa.schema(
        [
            *origin_columns(pa),
            ("input_ids", pa.list_(pa.int32())),
            ("assistant_masks", pa.list_(pa.int8())),
        ]
    )


def retokenised_texts(prompt: str, completion: str, view: TextView) -> TokensAndMask:
    """The tokens of TRL 1.16, trainer/dpo_trainer.py, for two texts; all of the completion counts.

    It adds the end-of-text token if that is missing.
    """
    assert view.template is not None
    tokenizer = view.template.tokenizer
    completion += "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return after_common(tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"])


def _pair_rows(source: Source) -> Iterator[Row]:
    return pairs(source, retokenised_texts)


TRL_SFT = Format(
    name="trl-sft",
    consumer="TRL's SFTTrainer",
    rows=_sft_rows,
    write=write_parquet("train.parquet", _sft_schema),
    unit="trajectory",
    fields={
        "input_ids": "prompt and response, the ids that the engine saw and sampled",
        "assistant_masks": "1 exactly where the engine sampled the token; "
        "SFTTrainer trains on these",
        **ORIGIN,
    },
    usage='SFTTrainer(train_dataset=datasets.load_dataset("parquet", '
    'data_files="train.parquet", split="train"), ...)',
)

TRL_PREFERENCE = Format(
    name="trl-preference",
    consumer="TRL's DPOTrainer and RewardTrainer",
    rows=_pair_rows,
    write=write_json_lines("train.jsonl"),
    unit="pair",
    fields=FIELDS,
    usage='DPOTrainer(train_dataset=datasets.load_dataset("json", '
    'data_files="train.jsonl", split="train"), ...)',
)
