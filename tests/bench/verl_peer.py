"""verl 0.6.1's own multi-turn loop on the scripted workload: the real `SGLangRollout`, only its engine is replaced.

What is changed, each because verl cannot run here without it: the engine object (a scripted one), the process group of
a machine without launcher and GPU, and the tool parser: verl picks `glm` for any vocabulary with `<tool_call>`, parses
nothing, and every conversation would end after its first turn.

Importing this imports torch, sglang and verl; on a CPU the import guards must be there before (see `loop_cpu`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from verl import DataProto
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.config.rollout import MultiTurnConfig
from verl.workers.rollout import schemas
from verl.workers.rollout.sglang_rollout import sglang_rollout

from agent.engines.engine import Generation
from tests.bench.workload import TOOL_NAME, TOOL_SCHEMA, VARIANTS, Workload, answer, tasks

PROMPT_LENGTH = 1024
TOKENS_PER_TURN = 128
"""More than a turn and its tool response need: no conversation may end early, and padding costs verl little."""


class EchoTool(BaseTool):  # type: ignore[misc]
    """Answers at once."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[ToolResponse, float, dict[str, Any]]:
        return ToolResponse(text=answer()), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


class _Engine:
    """What `SGLangRollout` asks of SGLang's engine."""

    def __init__(self, workload: Workload) -> None:
        self._answers = [_answer(turn) for turn in workload.turns]

    async def async_generate(self, input_ids: list[int], **request: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        return self._answers[len(input_ids) % VARIANTS]

    async def abort_request(self, **request: Any) -> None:
        pass

    async def flush_cache(self) -> None:
        pass


def _answer(turn: Generation) -> dict[str, Any]:
    triples = [(logprob, token, None) for logprob, token in zip(turn.logprobs, turn.token_ids, strict=True)]
    return {"output_ids": turn.token_ids, "meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": triples}}


class _Rollout(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        self._device_mesh_cpu = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp"))
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = 1

    def _init_inference_engine(self, trust_remote_code: bool, actor_module: str, port: int | None) -> None:
        self._engine: Any = None


class VerlPeer:
    """Measures verl's loop. One for the process; `close` it."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._folder = tempfile.TemporaryDirectory()
        self._loop = asyncio.new_event_loop()
        for module in (sglang_rollout, schemas):  # the check reports its differences at length
            logging.getLogger(module.__file__).setLevel(logging.ERROR)
        sglang_rollout.get_tool_call_parser_type = lambda _: "qwen25"
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "infer_tp", "pp"))
        self._model = HFModelConfig(path=str(self._write_model()), override_config={"attn_implementation": "sdpa"})

    def close(self) -> None:
        self._loop.close()
        self._folder.cleanup()
        dist.destroy_process_group()

    def cpu_ms(self, turns: int, conversations: int, check: str) -> float:
        """CPU ms per turn from a batch of prompts to the finished DataProto. `check`: disable or strict."""
        rollout, batch = self._rollout(turns, check), self._batch(conversations)
        asyncio.set_event_loop(self._loop)
        started = process_time()
        done = rollout.generate_sequences(batch)
        took_s = process_time() - started
        self._verify(done, turns, conversations)
        return 1e3 * took_s / (turns * conversations)

    def _rollout(self, turns: int, check: str) -> Any:
        multi_turn = MultiTurnConfig(
            enable=True,
            max_assistant_turns=turns,
            tool_config_path=str(self._write_tools()),
            tokenization_sanity_check_mode=check,
        )
        length = turns * TOKENS_PER_TURN
        config = RolloutConfig(
            name="sglang",
            mode="sync",
            skip_tokenizer_init=True,
            tensor_model_parallel_size=1,
            prompt_length=PROMPT_LENGTH,
            response_length=length,
            max_model_len=PROMPT_LENGTH + length,
            multi_turn=multi_turn,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # verl's BaseTool prints its schema
            rollout = _Rollout(config, self._model, self._mesh)
        rollout._engine = _Engine(self._workload)
        return rollout

    def _batch(self, conversations: int) -> Any:
        prompts = np.empty(conversations, dtype=object)
        kwargs = np.empty(conversations, dtype=object)
        for index, task in enumerate(tasks(conversations)):
            prompts[index], kwargs[index] = task.messages, {TOOL_NAME: {}}
        ids = torch.zeros((conversations, 1), dtype=torch.long)  # with tools, verl renders the prompt itself
        tensors = TensorDict({"input_ids": ids, "attention_mask": ids, "position_ids": ids}, batch_size=conversations)
        return DataProto(batch=tensors, non_tensor_batch={"raw_prompt": prompts, "tools_kwargs": kwargs}, meta_info={"do_sample": True})

    def _verify(self, done: Any, turns: int, conversations: int) -> None:
        """That each conversation has really made its turns and calls; verl drops the calls of the last turn."""
        expected = ["user", *["assistant", "tool"] * (turns - 1), "assistant"]
        found = [holder["messages"] for holder in done.non_tensor_batch["messages"]]
        if [[message.role for message in messages] for messages in found] != [expected] * conversations:
            raise RuntimeError(f"verl's conversations are not the scripted ones: {found[:1]}")
        if not all(m.content.startswith("x = ") for messages in found for m in messages if m.role == "tool"):
            raise RuntimeError(f"verl's tool did not answer: {found[:1]}")

    def _write_model(self) -> Path:
        """A model folder with the tokenizer and as much of a config as verl reads."""
        folder = Path(self._folder.name) / "model"
        self._workload.template.tokenizer.save_pretrained(folder)
        config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 1 << 20}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _write_tools(self) -> Path:
        path = Path(self._folder.name) / "tools.yaml"  # JSON is YAML
        tool = {"class_name": f"{__name__}.EchoTool", "config": {"type": "native"}, "tool_schema": TOOL_SCHEMA}
        path.write_text(json.dumps({"tools": [tool]}))
        return path
