"""What a run of the recipe is, and the words in which verl's trainer is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from agent.errors import ConfigError
from agent.recipe.grpo.reward import compute_score, tools_score

TOOLS = Path(__file__).parents[3] / "tool_configs" / "gsm8k.yaml"


class Loop(StrEnum):
    """Who runs the conversations: turntrace, or verl's own `tool_agent`."""

    turntrace = "turntrace"
    verl = "verl"


class Reward(StrEnum):
    """`function`: the text is scored, as verl does. `tools`: the tools' own reward counts.

    Either counts only if the model ended the conversation: see `reward.py`.
    """

    function = "function"
    tools = "tools"


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """One run. A step samples `prompts` x `samples` conversations and updates twice.

    prompt_tokens, response_tokens: verl's budgets
    held_out: problems that are asked, greedy, before the first step and after the last
    test_every: steps after which they are asked, too; 0: at no other
    failure_share: share of the programs that the sandbox's backend fails, on purpose
    save_every: steps between checkpoints, from which a killed run goes on
    train_tokens: the most tokens of a micro batch on the GPU
    """

    steps: int = 30
    prompts: int = 32
    samples: int = 8
    prompt_tokens: int = 768
    response_tokens: int = 512
    turns: int = 6
    lr: float = 5e-5
    held_out: int = 512
    loop: Loop = Loop.turntrace
    reward: Reward = Reward.function
    failure_share: float = 0.0
    save_every: int = 5
    test_every: int = 10
    train_tokens: int = 32_768
    workers: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        if self.loop is Loop.verl and self.reward is Reward.tools:
            raise ConfigError(
                "--reward tools needs turntrace's loop: verl's own does not ask tools for a "
                "reward; leave out --loop verl"
            )


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a run under its folder."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "data" / "train.parquet"

    @property
    def held_out(self) -> Path:
        return self.root / "data" / "held-out.parquet"

    @property
    def tools(self) -> Path:
        return self.root / "tools.yaml"

    @property
    def agent_loop(self) -> Path:
        return self.root / "turntrace.yaml"

    @property
    def steps(self) -> Path:
        """turntrace's run folders, `step-K-...`: sampled by the weights of step K."""
        return self.root / "steps"

    @property
    def dumps(self) -> Path:
        """verl's own dump of each training step, one JSONL file a step."""
        return self.root / "verl-steps"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    def kept_settings(self) -> dict[str, Any]:
        """The settings of the run in the folder. Raises ConfigError if it holds none."""
        try:
            found = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.root} holds no run of this recipe: settings.json cannot be read: {error}"
            ) from error
        return dict(found)

    def metrics(self) -> list[Path]:
        """verl's metrics, one JSONL file for each start, oldest first."""
        found = self.root.glob("metrics-*.jsonl")
        return sorted(found, key=lambda file: int(file.stem.rpartition("-")[2]))


def tools_yaml(settings: GrpoSettings) -> dict[str, Any]:
    """The shipped gsm8k tools, with the flaky sandbox; in the form that the loop can load."""
    config = yaml.safe_load(TOOLS.read_text(encoding="utf-8"))
    sandbox, answer = config["tools"]
    package = "agent.recipe.grpo"
    if settings.loop is Loop.verl:
        sandbox["class_name"] = f"{package}.verl_tools.VerlSandbox"
        answer["class_name"] = f"{package}.verl_tools.VerlAnswer"
        for tool in (sandbox, answer):
            tool["config"]["type"] = "native"
    elif settings.failure_share:
        sandbox["class_name"] = f"{package}.flaky.FlakySandboxTool"
    if settings.failure_share:
        sandbox["config"]["failure_share"] = settings.failure_share
    config["tools"] = [sandbox, answer]
    return dict(config)


def agent_loop_yaml(settings: GrpoSettings, layout: Layout) -> list[dict[str, Any]]:
    """The file that `agent_loop_config_path` names."""
    return [
        {
            "name": "turntrace",
            "_target_": "agent.verl_agent_loop.TurntraceAgentLoop",
            "save_to": str(layout.steps),
            "tool_config_path": str(layout.tools),
        }
    ]


def overrides(settings: GrpoSettings, layout: Layout, model: Path) -> list[str]:
    """The arguments of `python -m verl.trainer.main_ppo` (0.9.1): GRPO on one GPU."""
    groups = (
        _data(settings, layout),
        _actor(settings, model),
        _rollout(settings, layout),
        _trainer(settings, layout),
    )
    return [f"{name}={_text(value)}" for group in groups for name, value in group.items()]


def _data(settings: GrpoSettings, layout: Layout) -> dict[str, Any]:
    return {
        "data.train_files": layout.train,
        "data.val_files": layout.held_out,
        "data.train_batch_size": settings.prompts,
        "data.max_prompt_length": settings.prompt_tokens,
        "data.max_response_length": settings.response_tokens,
        "data.seed": settings.seed,
        "data.dataloader_num_workers": 0,
        "algorithm.adv_estimator": "grpo",
    }


def _actor(settings: GrpoSettings, model: Path) -> dict[str, Any]:
    actor = "actor_rollout_ref.actor"
    return {
        "actor_rollout_ref.model.path": model,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        # Without flash-attn verl takes log-probs of logits token by token: most of a step's time.
        "actor_rollout_ref.model.use_fused_kernels": True,
        "actor_rollout_ref.model.fused_kernel_options.impl_backend": "torch",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"{actor}.use_torch_compile": False,
        f"{actor}.optim.lr": settings.lr,
        f"{actor}.ppo_mini_batch_size": max(1, settings.prompts // 2),
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": settings.train_tokens,
        f"{actor}.use_kl_loss": False,
        f"{actor}.entropy_coeff": 0,
    }


def _rollout(settings: GrpoSettings, layout: Layout) -> dict[str, Any]:
    rollout = "actor_rollout_ref.rollout"
    turns = f"{rollout}.multi_turn"
    shared = {
        f"{rollout}.name": "sglang",
        f"{rollout}.n": settings.samples,
        f"{rollout}.load_format": "auto",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.free_cache_engine": False,
        f"{rollout}.gpu_memory_utilization": 0.8,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.max_num_seqs": settings.prompts * settings.samples,
        f"{rollout}.log_prob_max_token_len_per_gpu": settings.train_tokens,
        f"{rollout}.agent.num_workers": settings.workers,
        f"{turns}.enable": True,
        f"{turns}.max_assistant_turns": settings.turns,
        f"{turns}.max_parallel_calls": 16,
        f"{turns}.format": "hermes",
        "reward.num_workers": min(2, settings.workers),
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }
    if settings.loop is Loop.turntrace:
        return {
            **shared,
            f"{turns}.max_tool_response_length": 256,
            f"{rollout}.agent.agent_loop_config_path": layout.agent_loop,
            f"{rollout}.agent.default_agent_loop": "turntrace",
        }
    return {
        **shared,
        f"{turns}.max_tool_response_length": 1024,  # characters
        f"{turns}.tool_config_path": layout.tools,
        f"{rollout}.agent.default_agent_loop": "tool_agent",
    }


def _trainer(settings: GrpoSettings, layout: Layout) -> dict[str, Any]:
    score = tools_score if settings.reward is Reward.tools else compute_score
    return {
        "reward.custom_reward_function.path": score.__code__.co_filename,
        "reward.custom_reward_function.name": score.__name__,
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "turntrace",
        "trainer.experiment_name": "grpo",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.total_epochs": 1_000,
        "trainer.total_training_steps": settings.steps,
        "trainer.val_before_train": True,
        "trainer.test_freq": settings.test_every or settings.steps,
        "trainer.save_freq": settings.save_every,
        # With one, verl removes the last checkpoint before it names the new one.
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.default_local_dir": layout.checkpoints,
        "trainer.rollout_data_dir": layout.dumps,
        "trainer.resume_mode": "auto",
        "+ray_kwargs.ray_init.address": "local",
        "+ray_kwargs.ray_init.include_dashboard": False,
    }


def gpu_arguments(settings: GrpoSettings) -> dict[str, Any]:
    """SGLang's arguments on a Hopper GPU: no package beside sgl-kernel is needed for them.

    Its memory is what the step's conversations need: the rest is the trainer's.
    """
    at_once = settings.prompts * settings.samples
    return {
        "attention_backend": "fa3",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_piecewise_cuda_graph": True,  # see agent/engines/README.md
        "enable_memory_saver": False,
        "cuda_graph_max_bs": at_once,
        "max_total_tokens": at_once * (settings.prompt_tokens + settings.response_tokens),
    }


def engine_overrides(arguments: dict[str, Any]) -> list[str]:
    """SGLang's own arguments as overrides."""
    prefix = "+actor_rollout_ref.rollout.engine_kwargs.sglang"
    return [f"{prefix}.{name}={_text(value)}" for name, value in arguments.items()]


def _text(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(part) for part in value) + "]"
    if isinstance(value, (int, float)):
        return str(value)
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
