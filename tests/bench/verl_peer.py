"""verl 0.6.1's own multi-turn loop as a peer: the real `SGLangRollout`, only its engine is
replaced.

What is changed, each because verl cannot run here without it: the engine object, the process group
of a machine without launcher and GPU, and the tool parser: verl picks `glm` for any vocabulary with
`<tool_call>`, parses nothing, and every conversation would end after its first turn.

Importing this imports torch, sglang and verl; on a CPU the import guards must be there before (see
`loop_cpu`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Sequence
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
from agent.engines.rollout import MESH_DIMS
from agent.loop.tasks import Task
from tests.bench.workload import TOOL_NAME, TOOL_SCHEMA, VARIANTS, Workload, answer, tasks

PROMPT_LENGTH = 1024
TOKENS_PER_TURN = 128
"""More than a turn and its tool response need: no conversation may end early, and padding costs
verl little.
"""


class EchoTool(BaseTool):  # type: ignore[misc]
    """Answers at once."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        return ToolResponse(text=answer()), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0


class _Rollout(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    """verl's rollout without the start of an engine."""

    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        self._device_mesh_cpu = init_device_mesh(
            "cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp")
        )
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = 1

    def _init_inference_engine(
        self, trust_remote_code: bool, actor_module: str, port: int | None
    ) -> None:
        self._engine: Any = None


def rollout(config: RolloutConfig, model: HFModelConfig, engine: Any) -> Any:
    """verl's rollout over `engine`, which needs what `SGLangRollout` asks of one."""
    for module in (sglang_rollout, schemas):  # the check reports its differences at length
        logging.getLogger(module.__file__).setLevel(logging.ERROR)
    sglang_rollout.get_tool_call_parser_type = lambda _: "qwen25"
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # verl's BaseTool prints its schema
        made = _Rollout(config, model, init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=MESH_DIMS))
    made._engine = engine
    return made


def rollout_config(
    tools: Path, turns: int, prompt_length: int, response_length: int, check: str = "disable"
) -> RolloutConfig:
    """A trainer's rollout config. `check` is verl's tokenization check: disable or strict."""
    multi_turn = MultiTurnConfig(
        enable=True,
        max_assistant_turns=turns,
        tool_config_path=str(tools),
        tokenization_sanity_check_mode=check,
    )
    return RolloutConfig(
        name="sglang",
        mode="sync",
        skip_tokenizer_init=True,
        tensor_model_parallel_size=1,
        prompt_length=prompt_length,
        response_length=response_length,
        max_model_len=prompt_length + response_length,
        multi_turn=multi_turn,
    )


def model_config(folder: Path) -> HFModelConfig:
    return HFModelConfig(path=str(folder), override_config={"attn_implementation": "sdpa"})


def write_tools(path: Path, class_name: str, schema: dict[str, Any], **config: Any) -> Path:
    """A tools.yaml with one tool, at `path`."""
    tool = {"class_name": class_name, "config": {"type": "native", **config}, "tool_schema": schema}
    path.write_text(json.dumps({"tools": [tool]}))  # JSON is YAML
    return path


def batch(given: Sequence[Task], tool: str) -> DataProto:
    """The tasks as a trainer's batch, each with the one tool."""
    prompts = np.empty(len(given), dtype=object)
    kwargs = np.empty(len(given), dtype=object)
    for index, task in enumerate(given):
        prompts[index], kwargs[index] = task.messages, {tool: {}}
    ids = torch.zeros(
        (len(given), 1), dtype=torch.long
    )  # with tools, a rollout renders the prompt itself
    tensors = TensorDict(
        {"input_ids": ids, "attention_mask": ids, "position_ids": ids}, batch_size=len(given)
    )
    return DataProto(
        batch=tensors,
        non_tensor_batch={"raw_prompt": prompts, "tools_kwargs": kwargs},
        meta_info={"do_sample": True},
    )


class _Engine:
    """The scripted workload as SGLang's engine would say it."""

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
    triples = [
        (logprob, token, None) for logprob, token in zip(turn.logprobs, turn.token_ids, strict=True)
    ]
    return {
        "output_ids": turn.token_ids,
        "meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": triples},
    }


class VerlPeer:
    """Measures verl's loop on the scripted workload. One for the process; `close` it."""

    def __init__(self, workload: Workload) -> None:
        self._engine = _Engine(workload)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._loop = asyncio.new_event_loop()
        self._model = model_config(_write_model(folder / "model", workload))
        self._tools = write_tools(folder / "tools.yaml", f"{__name__}.EchoTool", TOOL_SCHEMA)

    def close(self) -> None:
        self._loop.close()
        self._folder.cleanup()
        dist.destroy_process_group()

    def cpu_ms(self, turns: int, conversations: int, check: str) -> float:
        """CPU ms per turn from a batch of prompts to the finished DataProto. `check`: disable or
        strict.
        """
        config = rollout_config(self._tools, turns, PROMPT_LENGTH, turns * TOKENS_PER_TURN, check)
        peer, given = (
            rollout(config, self._model, self._engine),
            batch(tasks(conversations), TOOL_NAME),
        )
        asyncio.set_event_loop(self._loop)
        started = process_time()
        done = peer.generate_sequences(given)
        took_s = process_time() - started
        _verify(done, turns, conversations)
        return 1e3 * took_s / (turns * conversations)


def _verify(done: DataProto, turns: int, conversations: int) -> None:
    """That each conversation has really made its turns and calls; verl drops the calls of the last
    turn.
    """
    expected = ["user", *["assistant", "tool"] * (turns - 1), "assistant"]
    found = [holder["messages"] for holder in done.non_tensor_batch["messages"]]
    if [[message.role for message in messages] for messages in found] != [expected] * conversations:
        raise RuntimeError(f"verl's conversations are not the scripted ones: {found[:1]}")
    if not all(
        m.content.startswith("x = ") for messages in found for m in messages if m.role == "tool"
    ):
        raise RuntimeError(f"verl's tool did not answer: {found[:1]}")


def _write_model(folder: Path, workload: Workload) -> Path:
    """A model folder with the tokenizer and as much of a config as verl reads."""
    workload.template.tokenizer.save_pretrained(folder)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 1 << 20,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
