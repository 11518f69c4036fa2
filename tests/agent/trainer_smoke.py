"""Two steps of a verl 0.6.1 trainer on CPU, up to the advantages: `python -m
tests.agent.trainer_smoke FOLDER`.

verl's own data loading, batch handling, reward manager and advantages around AgentRollout on the
embedded model, made as its workers make it, with a weight sync before each step. What needs a GPU
or Ray (the workers, the policy update) is left out. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from agent.commands.tasks_work import write_gsm_symbolic
from agent.engines.start import starting
from agent.model.base import TOOLS_NAME, resolve_model

PROBLEMS, SAMPLES = 1, 2
TOOLS = str(Path(__file__).resolve().parents[2] / "tool_configs" / "gsm8k.yaml")


def write_data(folder: Path) -> Path:
    """The generated problems as a verl data set."""
    import pandas

    write_gsm_symbolic(folder / "tasks.jsonl", PROBLEMS * 2, seed=0)
    rows = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    for row in rows:
        prompt = row["prompt"]
        row["prompt"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        truth = row["reward_model"]["ground_truth"]
        kwargs = {
            "calculate_answer": {"create_kwargs": {"ground_truth": truth}},
            "code_interpreter": {"create_kwargs": {"ground_truth": truth}},
        }
        row |= {
            "data_source": "openai/gsm8k",
            "extra_info": {
                "index": rows.index(row),
                "need_tools_kwargs": True,
                "tools_kwargs": kwargs,
            },
        }
    path = folder / "train.parquet"
    pandas.DataFrame(
        [
            {key: row[key] for key in ("prompt", "data_source", "reward_model", "extra_info")}
            for row in rows
        ]
    ).to_parquet(path)
    return path


def main(folder: Path) -> dict[str, Any]:
    model = resolve_model(TOOLS_NAME)
    config = {
        "mode": "sync",
        "prompt_length": 768,
        "response_length": 384,
        "max_model_len": 8192,  # all of the model's positions
        "temperature": 0.3,
        "max_num_seqs": 8,
        "calculate_log_probs": True,
        "multi_turn": {
            "enable": True,
            "max_assistant_turns": 6,
            "tool_config_path": TOOLS,
            "max_parallel_calls": 4,
        },
        "engine_kwargs": {
            "sglang": {"max_total_tokens": 16384},
            "turntrace": {"save_to": str(folder / "kept")},
        },
    }
    with starting():
        from agent.rollout import AgentRollout

        rollout = AgentRollout.alone(config, model, folder / "engine.log")
    loop = asyncio.new_event_loop()  # importing SGLang has changed its kind, in verl's workers too
    asyncio.set_event_loop(loop)
    try:
        return run(rollout, model, write_data(folder), loop)
    finally:
        loop.run_until_complete(rollout.engine().close())


def run(rollout: Any, model: Path, data: Path, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    import torch
    from omegaconf import OmegaConf
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.core_algos import AdvantageEstimator
    from verl.trainer.ppo.ray_trainer import compute_advantage, compute_response_mask
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    from verl.workers.reward_manager.naive import NaiveRewardManager

    tokenizer = AutoTokenizer.from_pretrained(model)
    options = {
        "max_prompt_length": 768,
        "return_raw_chat": True,
        "filter_overlong_prompts": False,
        "need_tools_kwargs": True,
    }
    dataset = RLHFDataset(
        str(data), tokenizer, OmegaConf.create({**options, "cache_dir": str(data.parent / "cache")})
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=PROBLEMS, collate_fn=collate_fn)
    steps = []
    for step, rows in enumerate(loader, 1):
        batch = DataProto.from_single_dict(rows)
        batch.non_tensor_batch["uid"] = np_objects(
            [str(uuid.uuid4()) for _ in range(len(batch.batch))]
        )
        keep = {"data_source", "reward_model", "extra_info", "uid"} & batch.non_tensor_batch.keys()
        gen_batch = batch.pop(
            ["input_ids", "attention_mask", "position_ids"],
            list(batch.non_tensor_batch.keys() - keep),
        )
        gen_batch.meta_info["global_steps"] = step
        weights = load_file(next(model.glob("*.safetensors")))
        loop.run_until_complete(
            rollout_mode(
                rollout, {name: tensor * (0.99 + step / 100) for name, tensor in weights.items()}
            )
        )
        made = rollout.generate_sequences(gen_batch.repeat(SAMPLES, interleave=True))
        loop.run_until_complete(rollout.release())
        batch = batch.repeat(SAMPLES, interleave=True).union(made)
        assert compute_response_mask(batch).shape == batch.batch["response_mask"].shape
        batch.batch["token_level_scores"] = NaiveRewardManager(tokenizer, num_examine=0)(batch)
        batch.batch["token_level_rewards"] = batch.batch["token_level_scores"]
        batch = compute_advantage(batch, AdvantageEstimator.GRPO, num_repeat=SAMPLES)
        steps.append(summary(batch))
    return {"steps": steps}


async def rollout_mode(rollout: Any, weights: dict[str, Any]) -> None:
    """What verl's workers do before a batch, in their order."""
    await rollout.resume(tags=["weights"])
    await rollout.update_weights(iter(weights.items()), peft_config=None, base_sync_done=True)
    await rollout.resume(tags=["kv_cache"])


def summary(batch: Any) -> dict[str, Any]:
    tensors = batch.batch
    mask = tensors["response_mask"].bool()
    return {
        "rows": len(tensors),
        "sampled_tokens": int(mask.sum()),
        "advantages_off_mask": float(tensors["advantages"][~mask].abs().sum()),
        "logprobs_off_mask": float(tensors["rollout_log_probs"][~mask].abs().sum()),
        "logprobs_finite": bool(tensors["rollout_log_probs"].isfinite().all()),
        "rewards": [row.get("calculate_answer") for row in batch.non_tensor_batch["reward_scores"]],
    }


def np_objects(values: list[Any]) -> Any:
    import numpy as np

    return np.array(values, dtype=object)


if __name__ == "__main__":
    print("SMOKE " + json.dumps(main(Path(sys.argv[1]))))
