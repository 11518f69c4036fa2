"""Batches of a verl 0.6.1 trainer through turntrace's loop: one runtime for all steps of the
trainer.

Keys that verl's `RolloutConfig` does not have stand under `rollout.engine_kwargs.turntrace`: the
fields of `TrainerOptions`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from agent.engines.engine import Engine
from agent.errors import ConfigError
from agent.loop.batch import run_conversations
from agent.loop.conversation import Conversation
from agent.loop.record import trajectory_of
from agent.loop.tasks import Task
from agent.runs.parts import config_interactions, config_tools, make_template, prepare
from agent.trainers.layout import batch_tasks, why_not_trained
from agent.trainers.options import (
    engine_sampling,
    manifest,
    rollout_options,
    trainer_config,
)
from agent.trainers.step_folders import NewFolders
from conversations.images.processor import ImageProcessor
from conversations.images.reading import Picture
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory

logger = logging.getLogger(__name__)

GREEDY = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "ignore_eos": False,
    "min_new_tokens": 0,
}
"""verl's params if a batch says `do_sample: false`."""


class TrainerBatches:
    """Runs a trainer's batches.

    `config` is verl's `RolloutConfig`, `sampling` the params that its rollout made of it, `images`
    the model's image processor, None if it sees none. `pictures` are those of the last batch, by
    hash. Raises
    ConfigError and TemplateError for a config that cannot take effect.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        config: Any,
        sampling: Mapping[str, Any],
        model: str,
        images: ImageProcessor | None = None,
    ) -> None:
        self.images = images
        self.pictures: dict[str, Picture] = {}
        self.config = config
        self._engine = engine
        self._sampling = sampling
        self._batches = 0
        if config.multi_turn.use_inference_chat_template:
            raise ConfigError(
                "rollout.multi_turn.use_inference_chat_template: the engine sees the tokens "
                "that were sampled, never a text rendered anew"
            )
        options = rollout_options(config)
        ours = trainer_config(model, config, options)
        self._parts = prepare(
            ours,
            config_tools(ours),
            config_interactions(ours),
            template=make_template(ours, tokenizer, images),
        )
        self._folders = NewFolders(options.save_to, tokenizer) if options.save_to else None

    async def run(self, prompts: Any, overrides: Mapping[str, Any]) -> list[Trajectory]:
        """The trajectory of each row, in the batch's order; `cancelled` if over-sampling cut it
        off.

        `overrides` are sampling params for this batch alone. Raises TaskError, naming the row, for
        a row that is not a task.
        """
        if self._parts.tools and not self._batches:
            await self._parts.tools.start()
        self._batches += 1
        meta = prompts.meta_info
        validate = bool(meta.get("validate", False))
        mode = self._mode(validate, meta.get("do_sample", True))
        sampling = engine_sampling({**self._sampling, **mode, **overrides})
        runtime = self._parts.runtime(self._engine, sampling)
        pairs = batch_tasks(prompts.non_tensor_batch, self._parts.interactions)
        self._warn_of_lost_users(pairs)
        conversations = [Conversation(task, sample, runtime) for task, sample in pairs]
        ended: set[tuple[str, int]] = set()
        with self._store(validate, meta.get("global_steps")) as store:
            progress = await run_conversations(
                conversations,
                max_concurrent=max(len(pairs), 1),
                target=None if validate else self._target(len(pairs)),
                store=store,
                on_done=lambda one: ended.add((one.task_id, one.sample)),
            )
        self.pictures = {
            sha256: picture for each in conversations for sha256, picture in each.pictures.items()
        }
        trajectories = [
            _as_it_ended(trajectory_of(conversation), ended) for conversation in conversations
        ]
        _warn(trajectories, progress.lost)
        return trajectories

    def _target(self, count: int) -> int:
        """How many rows over-sampling waits for: at least one, as verl does."""
        return max(1, int(count * (1 - self.config.over_sample_rate)))

    def _mode(self, validate: bool, do_sample: bool) -> Mapping[str, Any]:
        if not do_sample:
            return GREEDY
        if validate:
            keys = ("top_k", "top_p", "temperature")
            return {key: getattr(self.config.val_kwargs, key) for key in keys}
        return {}

    def _warn_of_lost_users(self, pairs: Sequence[tuple[Task, int]]) -> None:
        """Says once if rows choose interactions and the config has none; verl ignores such rows."""
        if self._parts.interactions is None and self._batches == 1:
            count = sum(bool(task.interaction_kwargs) for task, _ in pairs)
            if count:
                logger.warning(
                    "%d of %d rows have interaction_kwargs, but multi_turn.interaction_config_path "
                    "names no interactions: nobody answers their turns",
                    count,
                    len(pairs),
                )

    def _store(self, validate: bool, step: int | None) -> AbstractContextManager[RunFolder | None]:
        """The run folder of one batch.

        A step that the trainer runs again after a restart gets a folder of its own.
        """
        if self._folders is None:
            return nullcontext()
        number = self._batches - 1 if step is None else step
        name = f"{'val' if validate else 'train'}-{number}-rank-{os.environ.get('RANK', '0')}"
        trainer = {"rollout": dataclasses.asdict(self.config)}
        return self._folders.create(
            name, manifest(self._parts, trainer, validate=validate, step=step)
        )


def _as_it_ended(one: Trajectory, ended: Container[tuple[str, int]]) -> Trajectory:
    """Marks as cut off a row that had stopped by itself but whose rewards were not known yet."""
    if (one.task_id, one.sample) in ended:
        return one
    return dataclasses.replace(one, stop_reason="cancelled")


def _warn(trajectories: Sequence[Trajectory], lost: Sequence[str]) -> None:
    reasons = [reason for one in trajectories if (reason := why_not_trained(one))]
    if reasons:
        logger.warning(
            "%d of %d conversations are not trained on; the first: %s",
            len(reasons),
            len(trajectories),
            reasons[0],
        )
    for record in lost:
        logger.warning("a record is lost: %s", record)
