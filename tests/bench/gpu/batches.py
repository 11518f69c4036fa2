"""The load as a verl trainer sends it: `generate_sequences(DataProto)`, through ours and through verl 0.6.1's own loop.

Both are real rollouts on the one running engine. What is changed of verl's: its engine (the running one, its turns
replaced by the scripted ones), and the tool parser, of which verl picks one for Qwen's vocabulary that parses nothing.

Importing this imports torch, sglang and verl.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from verl import DataProto
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.config.rollout import MultiTurnConfig
from verl.workers.rollout import schemas
from verl.workers.rollout.sglang_rollout import sglang_rollout

from agent.rollout import MESH_DIMS, AgentRollout
from agent.trainer import TrainerBatches
from tests.bench.gpu.load import (
    ANSWER,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TOOL_NAME,
    TOOL_SCHEMA,
    TURNS,
    VARIANTS,
    WORK,
    Load,
    Outcome,
    tasks,
)
from tests.bench.gpu.machine import Gpu, measured


class VerlNapTool(BaseTool):  # type: ignore[misc]
    """`load.NapTool` in verl's terms."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[ToolResponse, float, dict[str, Any]]:
        await asyncio.sleep(self.config["nap_s"])
        return ToolResponse(text=ANSWER), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


class _Engine:
    """What `SGLangRollout` asks of its engine, from the running one."""

    def __init__(self, engine: Any, turns: list[list[int]]) -> None:
        self._engine = engine
        self._turns = turns

    async def async_generate(self, input_ids: list[int], return_logprob: bool = False, **request: Any) -> dict[str, Any]:
        answer = await self._engine.async_generate(input_ids=input_ids, sampling_params=WORK, return_logprob=return_logprob)
        meta = {**answer["meta_info"], "finish_reason": {"type": "stop"}}
        return {"output_ids": self._turns[len(input_ids) % VARIANTS], "meta_info": meta}

    async def abort_request(self, **request: Any) -> None:
        """verl aborts everything that runs once its batch has ended: nothing does."""

    async def flush_cache(self) -> None:
        await self._engine.flush_cache()


class _VerlRollout(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    """verl's rollout without the start of an engine."""

    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        self._device_mesh_cpu = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp"))
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = 1

    def _init_inference_engine(self, trust_remote_code: bool, actor_module: str, port: int | None) -> None:
        self._engine: Any = None


class Batches:
    """The two trainers' rollouts over `rollout`'s engine. `folder` takes their tool configs; `loop` is the engine's."""

    def __init__(self, rollout: AgentRollout, load: Load, model: Path, folder: Path, gpu: Gpu) -> None:
        self._rollout, self._load, self._folder, self._gpu = rollout, load, folder, gpu
        self._model = HFModelConfig(path=str(model), override_config={"attn_implementation": "sdpa"})
        for module in (sglang_rollout, schemas):
            logging.getLogger(module.__file__).setLevel(logging.ERROR)
        sglang_rollout.get_tool_call_parser_type = lambda _: "qwen25"

    def ours(self, conversations: int, nap_s: float) -> Outcome:
        rollout = self._rollout
        config = self._config(self._tools("tests.bench.gpu.load.NapTool", nap_s))
        rollout.__dict__["_trainer"] = TrainerBatches(
            self._load.scripted, rollout.processing_class, config, rollout.sampling_params, rollout.pad_token_id
        )
        return self._run(rollout, conversations)

    def verl(self, conversations: int, nap_s: float) -> Outcome:
        config = self._config(self._tools(f"{__name__}.VerlNapTool", nap_s))
        with contextlib.redirect_stdout(io.StringIO()):  # verl's BaseTool prints its schema
            rollout = _VerlRollout(config, self._model, init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=MESH_DIMS))
        rollout._engine = _Engine(self._rollout._engine, self._load.turns)
        return self._run(rollout, conversations)

    def _run(self, rollout: Any, conversations: int) -> Outcome:
        batch = _batch(conversations)
        gc.collect()
        with measured(self._gpu) as usage:
            done = rollout.generate_sequences(batch)
        turns = {sum(message.role == "assistant" for message in holder["messages"]) for holder in done.non_tensor_batch["messages"]}
        if turns != {TURNS}:
            raise RuntimeError(f"not every conversation made {TURNS} turns: {turns}; {done.non_tensor_batch['messages'][:1]}")
        return Outcome(conversations, usage)

    def _config(self, tools: Path) -> Any:
        multi_turn = MultiTurnConfig(
            enable=True,
            max_assistant_turns=TURNS,
            tool_config_path=str(tools),
            tokenization_sanity_check_mode="disable",
        )
        return RolloutConfig(
            name="sglang",
            mode="sync",
            skip_tokenizer_init=True,
            tensor_model_parallel_size=1,
            prompt_length=PROMPT_LENGTH,
            response_length=RESPONSE_LENGTH,
            max_model_len=PROMPT_LENGTH + RESPONSE_LENGTH,
            multi_turn=multi_turn,
        )

    def _tools(self, class_name: str, nap_s: float) -> Path:
        path = self._folder / f"{class_name}-{nap_s}.yaml"  # JSON is YAML
        tool = {"class_name": class_name, "config": {"type": "native", "nap_s": nap_s}, "tool_schema": TOOL_SCHEMA}
        path.write_text(json.dumps({"tools": [tool]}))
        return path


def _batch(conversations: int) -> Any:
    prompts = np.empty(conversations, dtype=object)
    kwargs = np.empty(conversations, dtype=object)
    for index, task in enumerate(tasks(conversations)):
        prompts[index], kwargs[index] = task.messages, {TOOL_NAME: {}}
    ids = torch.zeros((conversations, 1), dtype=torch.long)  # with tools, a rollout renders the prompt itself
    tensors = TensorDict({"input_ids": ids, "attention_mask": ids, "position_ids": ids}, batch_size=conversations)
    return DataProto(batch=tensors, non_tensor_batch={"raw_prompt": prompts, "tools_kwargs": kwargs}, meta_info={"do_sample": True})
