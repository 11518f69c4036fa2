"""The load as a verl trainer sends it: `generate_sequences(DataProto)`, through ours and through
verl 0.6.1's own loop.

Both are real rollouts on the one running engine; `verl_peer` says what is changed of verl's.
Importing this imports torch, sglang and verl.
"""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

from verl import DataProto
from verl.tools.schemas import ToolResponse

from agent.rollout import AgentRollout
from agent.trainers.batches import TrainerBatches
from tests.bench import verl_peer
from tests.bench.gpu.load import (
    ANSWER,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TOOL_NAME,
    TOOL_SCHEMA,
    TURNS,
    VARIANTS,
    Load,
    Outcome,
    tasks,
)
from tests.bench.gpu.machine import measured


class VerlNapTool(verl_peer.EchoTool):
    """`load.NapTool` in verl's terms."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        await asyncio.sleep(self.config["nap_s"])
        return ToolResponse(text=ANSWER), 0.0, {}


class _Engine:
    """What `SGLangRollout` asks of its engine, from the running one."""

    def __init__(self, engine: Any, load: Load) -> None:
        self._engine, self._load = engine, load

    async def async_generate(
        self, input_ids: list[int], return_logprob: bool = False, **request: Any
    ) -> dict[str, Any]:
        with self._load.requests.one():
            answer = await self._engine.async_generate(
                input_ids=input_ids, sampling_params=self._load.work, return_logprob=return_logprob
            )
        meta = {**answer["meta_info"], "finish_reason": {"type": "stop"}}
        return {"output_ids": self._load.turns[len(input_ids) % VARIANTS], "meta_info": meta}

    async def abort_request(self, **request: Any) -> None:
        """verl aborts everything that runs once its batch has ended: nothing does."""

    async def flush_cache(self) -> None:
        await self._engine.flush_cache()


class Batches:
    """The two trainers' rollouts over `rollout`'s engine. `folder` takes their tool configs."""

    def __init__(self, rollout: AgentRollout, load: Load, model: Path, folder: Path) -> None:
        self._rollout, self._load, self._folder = rollout, load, folder
        self._model = verl_peer.model_config(model)

    def ours(self, conversations: int, nap_s: float) -> Outcome:
        self._rollout.__dict__["_trainer"] = self.trainer(nap_s)
        return self.run(self._rollout, conversations)[0]

    def trainer(self, nap_s: float) -> TrainerBatches:
        """What runs a batch in our rollout, over scripted turns."""
        rollout, tools = self._rollout, self._tools("tests.bench.gpu.load.NapTool", nap_s)
        model = str(rollout.model_config.path)
        return TrainerBatches(
            self._load.scripted(),
            rollout.processing_class,
            _config(tools),
            rollout.sampling_params,
            model,
        )

    def verl(self, conversations: int, nap_s: float) -> Outcome:
        config = _config(self._tools(f"{__name__}.VerlNapTool", nap_s))
        return self.run(
            verl_peer.rollout(config, self._model, _Engine(self._rollout._engine, self._load)),
            conversations,
        )[0]

    def run(self, rollout: Any, conversations: int) -> tuple[Outcome, DataProto]:
        given = batch(conversations)
        gc.collect()
        with measured(self._load.gpu, self._load.requests, self._load.loop) as usage:
            done = rollout.generate_sequences(given)
        turns = {
            sum(message.role == "assistant" for message in holder["messages"])
            for holder in done.non_tensor_batch["messages"]
        }
        if turns != {TURNS}:
            raise RuntimeError(
                f"not every conversation made {TURNS} turns: {turns}; "
                f"{done.non_tensor_batch['messages'][:1]}"
            )
        return self._load.outcome(TURNS * conversations, usage), done

    def _tools(self, class_name: str, nap_s: float) -> Path:
        path = self._folder / f"{class_name}-{nap_s}.yaml"
        return verl_peer.write_tools(path, class_name, TOOL_SCHEMA, nap_s=nap_s)


def batch(conversations: int) -> DataProto:
    """The load's tasks as a trainer's batch."""
    return verl_peer.batch(tasks(conversations), TOOL_NAME)


def _config(tools: Path) -> Any:
    return verl_peer.rollout_config(tools, TURNS, PROMPT_LENGTH, RESPONSE_LENGTH)
