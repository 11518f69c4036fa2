"""verl 0.9.1's whole GRPO trainer on CPU: `python -m tests.agent.verl09.whole_trainer DATA OUT`.

Ray, FSDP, SGLang's server, the tools, the weight sync and the checkpoints are the real ones; the
model is the embedded one, or another folder (`--model`). It needs an environment with verl 0.9.1,
SGLang 0.5.12 and transformers 5.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from agent.engines import cpu_guards
from agent.model.base import resolve_model
from agent.recipe.grpo import trainer
from agent.recipe.grpo.settings import GrpoSettings, Layout, Loop, Reward, engine_overrides

SMALL = GrpoSettings(
    steps=2, prompts=2, samples=2, response_tokens=256, turns=4, held_out=4, save_every=1,
    train_tokens=4096, workers=1,
)  # fmt: skip
CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "enable_memory_saver": False,
    "sleep_on_idle": True,
    "max_total_tokens": 16384,
    "mem_fraction_static": 0.2,
}


def main() -> int:
    """Runs the steps; returns the trainer's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-tools")
    parser.add_argument("--steps", type=int, default=SMALL.steps)
    parser.add_argument("--loop", type=Loop, default=SMALL.loop)
    parser.add_argument("--reward", type=Reward, default=SMALL.reward)
    parser.add_argument("--failure-share", type=float, default=0.0)
    given = parser.parse_args()
    settings = replace(
        SMALL, steps=given.steps, loop=given.loop, reward=given.reward,
        failure_share=given.failure_share,
    )  # fmt: skip
    layout, model = Layout(given.out.resolve()), resolve_model(given.model)
    trainer.lay_out(settings, layout, given.data, model)
    cpus = {"+ray_kwargs.ray_init.num_gpus": 1, "ray_kwargs.ray_init.num_cpus": 16}
    extra = [
        *engine_overrides(CPU),
        *(f"{name}={value}" for name, value in cpus.items()),
        "trainer.device=cpu",
        "actor_rollout_ref.rollout.max_model_len=2048",
        # The engine's and the trainer's arithmetic differ in nothing else then.
        "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16",
    ]
    paths = [*sys.path[:1], *cpu_guards.guard_paths()]
    env = {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "tests.agent.verl09.cpu_platform",
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), *paths]).strip(":"),
    }
    return trainer.run_trainer(settings, layout, model, extra, env)


if __name__ == "__main__":
    sys.exit(main())
