"""verl 0.6.1's own rollout and ours, built for the same batches on the same scripted engine.

Importing this imports verl.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
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

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.errors import EngineError
from agent.rollout import AgentRollout
from conversations.template import ChatTemplate
from tests.helpers import LOOK_SCHEMA

Say = Callable[[str], str | list[int] | Exception]
"""What the model says after the text of a prompt: a text, to which the end token is added, or ids.
"""


class LookTool(BaseTool):  # type: ignore[misc]
    """A tool of verl's kind: answers, or breaks where the question says so; its reward is the
    number of its calls.

    A row's `calc_reward_kwargs` may say `wait_s`.
    """

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        super().__init__(config, tool_schema)
        self.calls: dict[str, int] = {}
        self.released: list[str] = []

    async def create(
        self, instance_id: str | None = None, **kwargs: Any
    ) -> tuple[str, ToolResponse]:
        assert instance_id is not None
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        self.calls[instance_id] = self.calls.get(instance_id, 0) + 1
        if parameters["question"] == "break":
            raise RuntimeError("the tool is broken")
        return (
            ToolResponse(
                text="word " * 300
                if parameters["question"] == "long"
                else f"about {parameters['question']}"
            ),
            0.0,
            {},
        )

    async def calc_reward(self, instance_id: str, wait_s: float = 0.0, **kwargs: Any) -> float:
        await asyncio.sleep(wait_s)
        return float(self.calls.get(instance_id, 0))

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.released.append(instance_id)


class Script:
    """One scripted engine in both shapes: SGLang's `async_generate`, as verl asks it, and
    turntrace's protocol.

    `seen` holds each request: (prompt ids, sampling params). `slow` is asked how many seconds a
    prompt takes. The cache cannot be flushed the first `busy` times.
    """

    def __init__(
        self, template: ChatTemplate, say: Say, slow: Callable[[str], float] = lambda text: 0.0
    ) -> None:
        self.template = template
        self.say = say
        self.slow = slow
        self.seen: list[tuple[list[int], dict[str, Any]]] = []
        self.flushed = self.busy = 0
        self.engine = _Native(self)

    def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        self.seen.append((list(prompt_ids), dict(sampling)))
        said = self.say(self.template.decode(prompt_ids))
        if isinstance(said, Exception):
            raise said
        ids = [*self.template.encode(said), self.template.end_id] if isinstance(said, str) else said
        return Generation(ids, [-0.5 - index / 8 for index in range(len(ids))], "stop")

    async def async_generate(
        self, input_ids: Any, sampling_params: dict[str, Any], **request: Any
    ) -> Any:
        if input_ids and isinstance(input_ids[0], list):
            return [await self.async_generate(ids, sampling_params) for ids in input_ids]
        await asyncio.sleep(self.slow(self.template.decode(input_ids)))
        made = self.sample(input_ids, sampling_params)
        triples = [
            (logprob, token, None)
            for logprob, token in zip(made.logprobs, made.token_ids, strict=True)
        ]
        return {
            "output_ids": made.token_ids,
            "meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": triples},
        }

    async def abort_request(self, **request: Any) -> None:
        """Nothing runs that could be aborted."""

    async def flush_cache(self) -> Any:
        self.flushed += 1
        return SimpleNamespace(success=self.flushed > self.busy)


class _Native(ScriptedEngine):
    """The script as turntrace's loop asks it; `aborted` counts the turns that were cancelled."""

    def __init__(self, script: Script) -> None:
        super().__init__(script.sample)
        self.script = script
        self.aborted = 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        try:
            await asyncio.sleep(self.script.slow(self.script.template.decode(prompt_ids)))
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        return await super().generate(prompt_ids, sampling, request_id=request_id)


class _Verls(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        self._device_mesh_cpu = init_device_mesh(
            "cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp")
        )
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = 1

    def _init_inference_engine(self, *args: Any) -> None:
        self._engine: Any = None


class _Ours(AgentRollout):
    def _init_inference_engine(self, *args: Any) -> None:
        self._engine: Any = None

    def engine(self) -> Any:
        return self._engine.engine


class Peers:
    """Both rollouts on one script. `folder` gets their model and tool files."""

    def __init__(self, folder: Path, template: ChatTemplate, ranks: int = 1) -> None:
        self.template = template
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        for module in (sglang_rollout, schemas):
            logging.getLogger(module.__file__).setLevel(logging.ERROR)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._mesh = init_device_mesh("cpu", (1, ranks, 1), mesh_dim_names=("dp", "infer_tp", "pp"))
        self._model = HFModelConfig(
            path=str(self._write_model()), override_config={"attn_implementation": "sdpa"}
        )

    def verls(self, script: Script, **config: Any) -> Any:
        """verl's own `SGLangRollout`."""
        return self._made(_Verls, script, config)

    def ours(self, script: Script | None, **config: Any) -> Any:
        """`AgentRollout`; on a rank that has no engine, without a script."""
        return self._made(_Ours, script, config)

    def run(self, rollout: Any, batch: DataProto, **overrides: Any) -> DataProto:
        """`generate_sequences`, as a worker calls it: from a thread whose event loop is the
        engine's.
        """
        asyncio.set_event_loop(self._loop)
        return rollout.generate_sequences(batch, **overrides)

    def close(self) -> None:
        self._loop.close()
        asyncio.set_event_loop(None)

    def _made(self, kind: type, script: Script | None, config: dict[str, Any]) -> Any:
        rollout = kind(self._config(**config), self._model, self._mesh)
        rollout._engine = script
        return rollout

    def _config(
        self, *, multi_turn: dict[str, Any] | None = None, tools: bool = False, **config: Any
    ) -> RolloutConfig:
        turns = {
            "enable": True,
            "max_assistant_turns": 8,
            "tokenization_sanity_check_mode": "disable",
            **(multi_turn or {}),
        }
        if tools:
            turns["tool_config_path"] = str(self._write_tools())
        shape = {
            "prompt_length": 256,
            "response_length": 512,
            "max_model_len": 768,
            "skip_tokenizer_init": True,
        }
        shape |= {"tensor_model_parallel_size": 1, **config}
        return RolloutConfig(
            name="sglang", mode="sync", multi_turn=MultiTurnConfig(**turns), **shape
        )

    def _write_model(self) -> Path:
        folder = self._folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        self.template.tokenizer.save_pretrained(folder)
        config = {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 1 << 16,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _write_tools(self) -> Path:
        path = self._folder / "tools.yaml"  # JSON is YAML
        path.write_text(
            json.dumps(
                {
                    "tools": [
                        {
                            "class_name": f"{__name__}.LookTool",
                            "config": {"type": "native"},
                            "tool_schema": LOOK_SCHEMA,
                        }
                    ]
                }
            )
        )
        return path


def batch(
    template: ChatTemplate,
    questions: Sequence[str],
    *,
    tools: bool = False,
    meta: dict[str, Any] | None = None,
    **columns: Any,
) -> DataProto:
    """A trainer's batch: left-padded prompts of 256 tokens, `raw_prompt`, and what `columns` adds,
    a list of one value a row.
    """
    messages = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        template.tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=True)
        for one in messages
    ]
    pad = template.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (256 - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (256 - len(one)) + [1] * len(one) for one in prompts])
    positions = torch.clip(mask.cumsum(-1) - 1, min=0)
    tensors = TensorDict(
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        batch_size=len(questions),
    )
    given = {
        "raw_prompt": messages,
        **({"tools_kwargs": [{"look": {}}] * len(questions)} if tools else {}),
        **columns,
    }
    non_tensors = {name: _objects(values) for name, values in given.items()}
    tokens = {"eos_token_id": template.end_id, "pad_token_id": pad}
    return DataProto(
        batch=tensors,
        non_tensor_batch=non_tensors,
        meta_info={"do_sample": True, **tokens, **(meta or {})},
    )


def _objects(values: Sequence[Any]) -> Any:
    column = np.empty(len(values), dtype=object)
    column[:] = list(values)
    return column


__all__ = ["EngineError", "LookTool", "Peers", "Script", "batch"]
