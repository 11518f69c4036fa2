"""AgentRollout: verl 0.6.1's SGLangRollout in a trainer, its multi_turn batches run by turntrace's
loop.

What it inherits and how its engine starts: `agent.engines.rollout`. What it does with a batch that
verl's own rollout does otherwise: the table in `agent/trainers/README.md`.

Importing it imports torch, sglang and verl. Users import it as `agent.rollout.AgentRollout`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from transformers import ProcessorMixin
from verl import DataProto
from verl.workers.rollout.schemas import Message
from verl.workers.rollout.sglang_rollout.utils import broadcast_pyobj

from agent.engines.rollout import EngineRollout, until_idle
from agent.errors import AgentError, ConfigError
from agent.loop.boundary import describe
from agent.trainers.batches import TrainerBatches
from agent.trainers.layout import Shape, batch_arrays, batch_columns, seen_inputs
from conversations.images.processor import SHAPES, processor_of

_Made = tuple[dict[str, Any], dict[str, Any]]
"""A batch's arrays and columns."""


class AgentRollout(EngineRollout):
    """verl's rollout worker with turntrace's loop in the place of verl's own."""

    def _req_level_generate_sequences(self, prompts: Any, **kwargs: Any) -> Any:
        """Runs a trainer's multi_turn batch on the first tensor-parallel rank; all ranks return it.

        An error there is raised on every rank, so none waits for one that is gone.
        """
        made: _Made | None = None
        failure: Exception | None = None
        if self._tp_rank == 0:
            try:
                made = self._run_batch(prompts, kwargs)
            except Exception as error:
                failure = error
        made, reason = self._from_first_rank((made, describe(failure) if failure else None))
        if failure:
            raise failure
        if made is None:
            raise AgentError(f"the first tensor-parallel rank failed: {reason}")
        return _batch(*made, prompts.batch["input_ids"].device)

    def _run_batch(self, prompts: Any, overrides: Mapping[str, Any]) -> _Made:
        loop = asyncio.get_event_loop()
        trajectories = loop.run_until_complete(self._trainer.run(prompts, overrides))
        loop.run_until_complete(until_idle(self._engine))
        images = self._trainer.images
        shape = Shape(
            self.config.prompt_length,
            self.config.response_length,
            self.pad_token_id,
            self.config.calculate_log_probs,
            images.merge_size if images else None,
        )
        columns = batch_columns(trajectories)
        if images:
            columns["multi_modal_inputs"] = seen_inputs(
                trajectories,
                shape,
                self._trainer.pictures,
                self.processing_class.image_processor,
            )
        return batch_arrays(trajectories, shape), columns

    def _from_first_rank(
        self, outcome: tuple[_Made | None, str | None]
    ) -> tuple[_Made | None, str | None]:
        """The first tensor-parallel rank's outcome, on every rank.

        It travels over the CPU's group.
        """
        group = self._device_mesh_cpu["tp"]
        if group.size() == 1:
            return outcome
        received = broadcast_pyobj(
            [outcome],
            rank=self._rank,
            dist_group=group.get_group(),
            src=group.mesh[0].item(),
            force_cpu_device=True,
        )
        return received[0]  # type: ignore[no-any-return]

    @functools.cached_property
    def _trainer(self) -> TrainerBatches:
        given, images = self.processing_class, None
        if isinstance(given, ProcessorMixin):
            images = processor_of(given)
            if images is None:
                raise ConfigError(
                    f"{self.model_config.path} has a {type(given).__name__}; images are supported "
                    f"of {', '.join(SHAPES)}"
                )
        return TrainerBatches(
            self.engine(),
            given.tokenizer if images else given,
            self.config,
            self.sampling_params,
            str(self.model_config.path),
            images,
        )


def _batch(arrays: Mapping[str, Any], columns: dict[str, Any], device: torch.device) -> DataProto:
    """The batch that verl's trainer expects back, its messages in verl's own class."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    for index, messages in enumerate(columns["messages"]):
        columns["messages"][index] = {"messages": [Message(**message) for message in messages]}
    return DataProto(
        batch=TensorDict(tensors, batch_size=len(columns["messages"])), non_tensor_batch=columns
    )


def refuse_async(**_arguments: Any) -> None:
    """Stands in for verl's class of `mode: async`, which would run verl's own loop without a word.

    Raises ConfigError.
    """
    raise ConfigError(
        "actor_rollout_ref.rollout.mode: with external_lib agent.rollout only sync works; "
        "async runs verl's own agent loop"
    )
