"""What verl 0.6.1's own classes make of an export: its RL dataset, its multi-turn SFT dataset,
its DataProto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conversations.export.text import TextView, whole_ids, whole_mask
from conversations.export.verl_rl import given
from conversations.export.verl_sft import retokenised_blocks
from conversations.padding import padded_batch
from tests.command import TRAINER, run_warm
from tests.conversations.exports import exported, qwen3_run, small_run


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` unpacks goes to a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("hf_cache")
def test_the_rl_dataset_gives_the_tasks_back() -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    folder, done = exported("verl-rl")
    config = OmegaConf.create(
        {
            "max_prompt_length": 2048,
            "return_raw_chat": True,
            "filter_overlong_prompts": False,
            "truncation": "left",
        }
    )
    dataset = RLHFDataset(str(folder / "train.parquet"), small_run().tokenizer(), config)
    firsts = {
        record["task_id"]: record
        for record in reversed(list(small_run().records()))
        if not record["infra_error"]
    }
    assert len(dataset) == done.rows == len(firsts)
    for row in (dataset[index] for index in range(len(dataset))):
        record = firsts[row["extra_info"]["turntrace"]["task_id"]]
        assert [(m["role"], m["content"]) for m in row["raw_prompt"]] == [
            (m["role"], m["content"]) for m in given(record)
        ]
        assert row["reward_model"]["ground_truth"] == record["ground_truth"]
        assert row["data_source"] == record["data_source"]
        assert row["index"] == record["extra"]["extra_info"]["index"]
        assert row["extra_info"]["turntrace"]["samples"] > 0
        if kwargs := record["extra"]["extra_info"].get("tools_kwargs"):
            assert row["tools_kwargs"]["lookup"] == kwargs["lookup"]


def test_turntrace_runs_the_same_tasks_again() -> None:
    from agent.loop.tasks import read_tasks

    folder, done = exported("verl-rl")
    tasks = {task.id: task for task in read_tasks(folder / "train.parquet")}
    assert len(tasks) == done.rows
    for record in small_run().records():
        if not record["infra_error"]:
            task = tasks[record["task_id"]]
            assert [(m["role"], m["content"]) for m in task.messages] == [
                (m["role"], m["content"]) for m in given(record)
            ]
            assert (task.ground_truth, task.data_source) == (
                record["ground_truth"],
                record["data_source"],
            )


def test_the_sft_dataset_trains_on_what_the_card_says() -> None:
    """Its ids and loss mask are those that the export foresaw, and the record's but for what the
    verdicts name."""
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    folder, done = exported("verl-sft")
    run = small_run()
    view = TextView(run.template(), {})
    dataset = MultiTurnSFTDataset(
        str(folder / "train.parquet"),
        run.tokenizer(),
        {"pad_mode": "no_padding", "max_length": 8192},
    )
    assert len(dataset) == done.rows > 20
    found = {"scaffold": 0, "mask": 0}
    newline = run.template().encode("\n")
    for index in range(len(dataset)):
        item = dataset[index]
        record = run.record(dataset.dataframe["id"][index])
        ids, mask = item["input_ids"].tolist(), item["loss_mask"].tolist()
        assert (ids, mask) == retokenised_blocks(dataset.messages[index], view)
        end = record["turns"][-1]["end"]
        assert ids[:end] == whole_ids(record)[:end]
        assert ids[end:] in ([], newline, [run.template().end_id, *newline])
        own = whole_mask(record)[:end] + [0] * (len(ids) - end)
        more = {token for token, theirs, ours in zip(ids, mask, own, strict=True) if theirs != ours}
        found["scaffold" if more == set(newline) else "mask"] += 1
    assert {name: done.verdicts[name] for name in found} == found


def test_a_template_that_rewrites_history_is_found_out() -> None:
    """Qwen3: verl's dataset gets other tokens than the model sampled, which is what the export
    says of each trajectory."""
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    run = qwen3_run()
    folder, done = exported("verl-sft", run)
    view = TextView(run.template(), {})
    dataset = MultiTurnSFTDataset(
        str(folder / "train.parquet"),
        run.tokenizer(),
        {"pad_mode": "no_padding", "max_length": 8192},
    )
    assert len(dataset) == done.rows == done.verdicts["tokens"] > 5
    for index in range(len(dataset)):
        item = dataset[index]
        ids = item["input_ids"].tolist()
        tokens = retokenised_blocks(dataset.messages[index], view)
        assert (ids, item["loss_mask"].tolist()) == tokens
        record = run.record(dataset.dataframe["id"][index])
        assert ids[: len(record["prompt_ids"])] == record["prompt_ids"], (
            "the tools stand in the prompt as they did"
        )
        assert ids[: record["turns"][-1]["end"]] != whole_ids(record)[: record["turns"][-1]["end"]]


def test_dataproto_is_the_batch_that_a_rollout_returns() -> None:
    from verl import DataProto

    folder, _ = exported("dataproto")
    run = small_run()
    batch = DataProto.load_from_disk(folder / "batch-00000.pkl")
    records = [record for record in run.records() if record["turns"] and not record["infra_error"]]
    assert list(batch.non_tensor_batch["request_id"]) == [record["id"] for record in records]
    pad = run.tokenizer().pad_token_id
    for index, record in enumerate(records):
        row = {name: tensor[index] for name, tensor in batch.batch.items()}
        prompt, response, count = (
            record["prompt_ids"],
            record["response_ids"],
            len(record["response_ids"]),
        )
        assert row["prompts"].tolist() == [pad] * (1024 - len(prompt)) + prompt
        assert row["responses"].tolist() == response + [pad] * (1024 - count)
        assert row["response_mask"].tolist() == record["response_mask"] + [0] * (1024 - count)
        assert row["rollout_log_probs"].tolist()[:count] == [
            value or 0.0 for value in record["response_logprobs"]
        ]
        assert row["position_ids"][row["attention_mask"].bool()].tolist() == list(
            range(len(prompt) + count)
        )
        assert batch.non_tensor_batch["messages"][index] == {"messages": record["messages"]}
        assert batch.non_tensor_batch["reward_scores"][index] == record["reward_parts"]


def test_dataproto_equals_what_the_trainers_rollout_returns_tensor_for_tensor(
    tmp_path: Path,
) -> None:
    """`AgentRollout.generate_sequences` returns `batch_arrays`; failures of the infrastructure
    are rows that nothing is learnt from."""
    import torch
    from verl import DataProto

    from agent.trainers.layout import Shape, batch_arrays
    from conversations.export import job
    from conversations.export.filters import Filters

    run = small_run()
    job.export_run(
        run, "dataproto", tmp_path / "out", Filters(include_infra_errors=True), batch_size=16
    )
    trajectories = [one for one in run if one.turns]
    assert any(one.infra_error for one in trajectories)
    files = sorted((tmp_path / "out").glob("*.pkl"))
    assert len(files) == -(-len(trajectories) // 16)
    shape = Shape(
        prompt_length=1024, response_length=1024, pad_id=run.tokenizer().pad_token_id, logprobs=True
    )
    for index, file in enumerate(files):
        expected = batch_arrays(trajectories[16 * index : 16 * (index + 1)], shape)
        found = DataProto.load_from_disk(file).batch
        assert sorted(found.keys()) == sorted(expected.keys())
        for name, array in expected.items():
            assert torch.equal(found[name], torch.from_numpy(array)), name


def test_batches_are_laid_out_as_verls_own_loop_lays_them_out() -> None:
    """verl's real rollout on a scripted engine; from what it returns the trajectories, and from
    those the batch again."""
    done = run_warm("tests.conversations.verl_batches", timeout=300, imports=TRAINER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stdout.splitlines()[-1]
        == "equal: attention_mask input_ids position_ids prompts response_mask responses"
    )


def test_a_batch_grows_with_what_is_longer_than_the_config_says() -> None:
    trajectories = [one for one in small_run() if one.turns][:3]
    arrays: dict[str, Any] = padded_batch(
        trajectories, prompt_length=1, response_length=2, pad_id=7, logprobs=False
    )
    assert arrays["prompts"].shape == (3, max(len(one.prompt_ids) for one in trajectories))
    assert arrays["responses"].shape == (3, max(len(one.response_ids) for one in trajectories))
    assert "rollout_log_probs" not in arrays
