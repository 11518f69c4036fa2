"""What TRL's own trainers make of an export: the labels that SFTTrainer trains on, the pairs
that DPOTrainer compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conversations.export.text import whole_ids, whole_mask
from conversations.export.trl import retokenised_texts
from tests.conversations.exports import exported, rows, small_run


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`datasets.load_dataset` of one local file, unpacked in a folder of the test's own."""
    import datasets

    return lambda kind, file: datasets.load_dataset(
        kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(small_run().tokenizer()), **size))


def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_length": None,
    }


def test_the_sft_trainer_has_the_records_ids_and_trains_on_what_was_sampled(
    load: Any, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    folder, done = exported("trl-sft")
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=load("parquet", folder / "train.parquet"),
        processing_class=small_run().tokenizer(),
    )
    records = [
        record for record in small_run().records() if record["turns"] and not record["infra_error"]
    ]
    assert len(trainer.train_dataset) == done.rows == len(records)
    for row, record in zip(trainer.train_dataset, records, strict=True):
        ids, mask = whole_ids(record), whole_mask(record)
        assert row["input_ids"] == ids
        assert row["labels"] == [
            token if own else -100 for token, own in zip(ids, mask, strict=True)
        ]
    batch = trainer.data_collator(
        [{name: trainer.train_dataset[0][name] for name in ("input_ids", "labels")}]
    )
    assert batch["labels"][0].tolist() == trainer.train_dataset[0]["labels"]


def test_the_sft_trainer_trains_on_plain_rows(load: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    folder, done = exported("rows")
    written = load("parquet", folder / "rows.parquet")
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(**settings(tmp_path), max_steps=1, per_device_train_batch_size=2),
        train_dataset=written,
        processing_class=small_run().tokenizer(),
    )
    assert len(trainer.train_dataset) == done.rows > 0
    for given, row in zip(trainer.train_dataset, written, strict=True):
        assert given["input_ids"] == row["input_ids"]
        assert [label != -100 for label in given["labels"]] == list(map(bool, row["loss_mask"]))
    assert trainer.train().global_step == 1


def test_the_dpo_trainer_compares_the_best_with_the_worst_of_each_group(
    load: Any, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    folder, done = exported("trl-preference")
    run = small_run()
    tokenizer = run.tokenizer()
    trainer = DPOTrainer(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=DPOConfig(**settings(tmp_path)),
        train_dataset=load("json", folder / "train.jsonl"),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == done.rows > 5
    found = {"same": 0, "mask": 0, "tokens": 0}
    for row, written in zip(trainer.train_dataset, rows(folder), strict=True):
        group = [
            one
            for one in run
            if one.task_id == written["task_id"] and not one.infra_error and one.reward is not None
        ]
        assert (
            written["chosen_reward"]
            == max(one.reward or 0.0 for one in group)
            > written["rejected_reward"]
        )
        for name in ("chosen", "rejected"):
            record = run.record(written[f"{name}_id"])
            end = record["turns"][-1]["end"]
            ids = row["prompt_ids"] + row[f"{name}_ids"]
            assert (
                ids,
                [0] * len(row["prompt_ids"]) + [1] * len(row[f"{name}_ids"]),
            ) == retokenised_texts(written["prompt"], written[name], _view())
            sampled = whole_mask(record)[:end]
            same_ids = ids[:end] == whole_ids(record)[:end]
            same_mask = (
                len(ids) == end
                and row["prompt_ids"] == record["prompt_ids"]
                and all(sampled[len(record["prompt_ids"]) :])
            )
            found["same" if same_ids and same_mask else "mask" if same_ids else "tokens"] += 1
    assert {name: done.verdicts[name] for name in found} == found


def _view() -> Any:
    from conversations.export.text import TextView

    return TextView(small_run().template(), {})
