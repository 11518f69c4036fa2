"""What OpenRLHF's own datasets make of an export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conversations.export.openrlhf import retokenised_messages, retokenised_pair
from conversations.export.text import TextView, whole_ids
from tests.conversations.exports import exported, rows, small_run


@pytest.fixture
def load(tmp_path: Path) -> Any:
    import datasets

    return lambda folder: datasets.load_dataset(
        "json",
        data_files=str(folder / "train.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )


def strategy(**data: Any) -> Any:
    """As much of OpenRLHF's strategy as its datasets ask: where its command line's data options
    lie, and who prints."""
    return SimpleNamespace(
        args=SimpleNamespace(data=SimpleNamespace(**data)), is_rank_0=lambda: False, print=print
    )


def test_the_sft_dataset_trains_on_what_the_export_foresaw(load: Any) -> None:
    from openrlhf.datasets import SFTDataset

    folder, done = exported("openrlhf-sft")
    run = small_run()
    view = TextView(run.template(), {})
    tokenizer = run.tokenizer()
    options = strategy(input_key="input", output_key=None, apply_chat_template=True)
    dataset = SFTDataset(load(folder), tokenizer, 8192, options, num_processors=1, multiturn=True)
    assert len(dataset) == done.rows
    for index, written in enumerate(rows(folder)):
        ids, _, loss = dataset[index]
        trained = [
            0,
            *loss[0, :-1].int().tolist(),
        ]  # its mask stands on the token before the one that is to be said
        assert (ids[0].tolist(), trained) == retokenised_messages(written["input"], view)
        record = run.record(written["id"])
        end = record["turns"][-1]["end"]
        assert ids[0].tolist()[:end] == whole_ids(record)[:end]
    assert done.verdicts["same"] + done.verdicts["scaffold"] + done.verdicts["mask"] == done.rows


def test_the_prompt_dataset_gives_the_prompts_ids() -> None:
    from openrlhf.datasets import PromptDataset

    folder, done = exported("openrlhf-prompts")
    run = small_run()
    tokenizer = run.tokenizer()
    written = rows(folder)
    dataset = PromptDataset(
        written,
        tokenizer,
        strategy(input_key="input", label_key="label", apply_chat_template=False),
    )
    assert len(dataset) == done.rows == done.verdicts["same"]
    for (source, prompt, label, _), row in zip(
        (dataset[index] for index in range(len(dataset))), written, strict=True
    ):
        record = next(
            one for one in run.records() if one["task_id"] == row["task_id"] and one["prompt_ids"]
        )
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == record["prompt_ids"]
        assert (source, label) == (record["data_source"], record["ground_truth"])


def test_the_reward_dataset_reads_the_pairs(load: Any) -> None:
    from openrlhf.datasets import RewardDataset

    folder, done = exported("openrlhf-preference")
    run = small_run()
    view = TextView(run.template(), {})
    options = strategy(
        prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=False
    )
    dataset = RewardDataset(
        load(folder), run.tokenizer(), 8192, options, is_dpo=True, num_processors=1
    )
    assert len(dataset) == done.rows > 5
    for index, written in enumerate(rows(folder)):
        chosen, _, rejected, _, prompt_length = dataset[index]
        assert prompt_length == len(run.record(written["chosen_id"])["prompt_ids"])
        for name, found in (("chosen", chosen), ("rejected", rejected)):
            record = run.record(written[f"{name}_id"])
            end = record["turns"][-1]["end"]
            assert found[0].tolist() == retokenised_pair(written["prompt"], written[name], view)[0]
            assert found[0].tolist()[:end] == whole_ids(record)[:end]
