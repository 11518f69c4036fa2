"""Batches of a verl trainer through turntrace's loop: the trainer's config as ours, one runtime for all of its steps.

Named in a trainer's config as `actor_rollout_ref.model.external_lib: agent.rollout`. What verl's `RolloutConfig` has
no key for stands under `rollout.engine_kwargs.turntrace`: the fields of `TrainerOptions`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from agent.config.secrets import without_secrets
from agent.engines.engine import Engine
from agent.errors import ConfigError
from agent.loop.batch import run_conversations
from agent.loop.calls import Dispatcher
from agent.loop.loop import Conversation, LoopSettings, Runtime
from agent.loop.users import Interactions, load_interactions
from agent.runs.manifest import source, versions
from agent.trainers.layout import batch_tasks, why_not_trained
from agent.trainers.step_folders import NewFolders
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from conversations.trajectory import Trajectory
from conversations.truncate import cut_to_tokens
from tools.registry import load_tools
from tools.toolset import ToolSet

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=pydantic.BaseModel)

NOT_SAMPLING = frozenset(
    {"n", "max_new_tokens", "skip_special_tokens", "spaces_between_special_tokens"}
)
"""Of verl's sampling params, those that the loop sets or that only texts have."""
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
"""verl's params where a batch says `do_sample: false`."""


class TrainerOptions(pydantic.BaseModel):
    """`rollout.engine_kwargs.turntrace` in a trainer's config; meanings as under `rollout.turntrace` outside of one.

    `save_to`: a folder that gets a run folder for each batch, `train-STEP-rank-R` or `val-STEP-rank-R`.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    apply_chat_template_kwargs: dict[str, Any] = {}
    max_consecutive_invalid_calls: pydantic.PositiveInt | None = 8
    conversation_deadline_s: pydantic.PositiveFloat | None = None
    max_tokens: pydantic.PositiveInt | None = None
    save_to: Path | None = None


class TrainerBatches:
    """Runs a trainer's batches. `config` is verl's `RolloutConfig`, `sampling` the params its rollout made of it."""

    def __init__(
        self, engine: Engine, tokenizer: Any, config: Any, sampling: Mapping[str, Any], model: str
    ) -> None:
        self.config = config
        self._model = model
        self._options = _options(config)
        self._sampling = sampling
        self._batches = 0
        multi_turn = config.multi_turn
        if multi_turn.use_inference_chat_template:
            raise ConfigError(
                "rollout.multi_turn.use_inference_chat_template: the engine sees what was sampled, nothing rendered anew"
            )
        self._tools = (
            load_tools(multi_turn.tool_config_path) if multi_turn.tool_config_path else None
        )
        path = multi_turn.interaction_config_path
        self._interactions = load_interactions(Path(path)) if path else None
        template = ChatTemplate(tokenizer, kwargs=self._options.apply_chat_template_kwargs)
        dispatcher = tool_dispatcher(self._tools, template, multi_turn)
        if self._interactions:
            template.require(USER)
        save_to = self._options.save_to
        self._folders = NewFolders(save_to, tokenizer) if save_to else None
        self._runtime = Runtime(
            engine, template, self._settings({}), dispatcher, interactions=self._interactions
        )

    async def run(self, prompts: Any, overrides: Mapping[str, Any]) -> list[Trajectory]:
        """The trajectory of each row, in the batch's order. Those cut off by over-sampling have `cancelled`."""
        if self._tools and not self._batches:
            await self._tools.start()
        self._batches += 1
        meta = prompts.meta_info
        validate = bool(meta.get("validate", False))
        settings = self._settings(
            {**self._mode(validate, meta.get("do_sample", True)), **overrides}
        )
        runtime = dataclasses.replace(self._runtime, settings=settings)
        conversations = [
            Conversation(task, sample, runtime)
            for task, sample in batch_tasks(prompts.non_tensor_batch)
        ]
        count = len(conversations)
        target = (
            None if validate else max(1, int(count * (1 - self.config.over_sample_rate)))
        )  # as verl does: one at least
        ended: set[tuple[str, int]] = set()
        with self._store(validate, meta.get("global_steps")) as store:
            progress = await run_conversations(
                conversations,
                max_concurrent=max(count, 1),
                target=target,
                store=store,
                on_done=lambda one: ended.add((one.task_id, one.sample)),
            )
        trajectories = [
            _as_it_ended(conversation.trajectory(), ended) for conversation in conversations
        ]
        _warn(trajectories, progress.lost)
        return trajectories

    def _mode(self, validate: bool, do_sample: bool) -> Mapping[str, Any]:
        if not do_sample:
            return GREEDY
        if validate:
            return {
                key: getattr(self.config.val_kwargs, key)
                for key in ("top_k", "top_p", "temperature")
            }
        return {}

    def _settings(self, overrides: Mapping[str, Any]) -> LoopSettings:
        return loop_settings(self.config, self._options, {**self._sampling, **overrides})

    def _store(self, validate: bool, step: int | None) -> AbstractContextManager[RunFolder | None]:
        """The run folder of one batch; a step that the trainer does again, after a restart, gets one of its own."""
        if self._folders is None:
            return nullcontext()
        number = self._batches - 1 if step is None else step
        name = f"{'val' if validate else 'train'}-{number}-rank-{os.environ.get('RANK', '0')}"
        config = run_config(self._model, self.config, self._settings({}), self._options)
        trainer = {"rollout": dataclasses.asdict(self.config)}
        return self._folders.create(
            name,
            manifest(
                config, self._tools, self._interactions, trainer, validate=validate, step=step
            ),
        )


def _as_it_ended(one: Trajectory, ended: Container[tuple[str, int]]) -> Trajectory:
    """Cut off is also what had stopped by itself, but whose rewards were still being asked for."""
    return (
        one
        if (one.task_id, one.sample) in ended
        else dataclasses.replace(one, stop_reason="cancelled")
    )


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


ROLLOUT_KEYS = (
    "prompt_length",
    "response_length",
    "calculate_log_probs",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "over_sample_rate",
)
TURN_KEYS = (
    "max_user_turns",
    "tool_config_path",
    "interaction_config_path",
    "max_parallel_calls",
    "max_tool_response_length",
    "tool_response_truncate_side",
)
OUR_KEYS = (
    "max_consecutive_invalid_calls",
    "conversation_deadline_s",
    "max_tokens",
    "apply_chat_template_kwargs",
)


def run_config(
    model: str, config: Any, settings: LoopSettings, options: TrainerOptions, **paths: Any
) -> dict[str, Any]:
    """A run.json's `config` in turntrace's own keys: what took effect, so that the run can be verified and replayed.

    `config` is verl's rollout config, of any version: what it has no key for is left out. `paths` count for its own.
    """
    turns = {**{key: config.multi_turn.get(key) for key in TURN_KEYS}, **paths}
    rollout = {
        **{key: config.get(key) for key in ROLLOUT_KEYS if config.get(key) is not None},
        "max_model_len": settings.max_model_len,
        "multi_turn": {**turns, "enable": True, "max_assistant_turns": settings.max_turns},
        "turntrace": {key: getattr(options, key) for key in OUR_KEYS},
    }
    return _plain({"model_path": model, "rollout": rollout})


def manifest(
    config: Mapping[str, Any],
    tools: ToolSet | None,
    interactions: Interactions | None,
    trainer: Mapping[str, Any],
    **which: Any,
) -> dict[str, Any]:
    """A run.json: `config` as `run_config` makes it, `trainer` what the trainer was told, `which` names the batch."""
    texts = {"tools": source(tools), "interactions": source(interactions)}
    return {
        "config": config,
        **texts,
        **which,
        "trainer": _plain(trainer),
        "versions": versions(),
        "parent": None,
    }


def tool_dispatcher(
    tools: ToolSet | None, template: ChatTemplate, multi_turn: Any
) -> Dispatcher | None:
    """The tools under the limits of verl's `multi_turn` config.

    Raises TemplateError where the template has no tool turns, ConfigError where calls are to be written in another form.
    """
    if not tools:
        return None
    template.require(TOOL)
    if (form := multi_turn.get("format", "hermes")) != "hermes":
        raise ConfigError(
            f"rollout.multi_turn.format: {form}: only hermes tool calls (<tool_call>{{...}}</tool_call>) are read"
        )
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    cut = functools.partial(cut_to_tokens, template=template, limit=limit, side=side)
    return Dispatcher(tools, max_parallel_calls=multi_turn.max_parallel_calls or 16, cut=cut)


def loop_settings(
    config: Any, options: TrainerOptions, sampling: Mapping[str, Any]
) -> LoopSettings:
    """The budgets of verl's rollout config, and what of verl's sampling params is the engine's."""
    longest = config.prompt_length + config.response_length
    return LoopSettings(
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        max_model_len=min(config.max_model_len or longest, longest),
        max_tokens=options.max_tokens,
        max_turns=config.multi_turn.max_assistant_turns,
        max_user_turns=config.multi_turn.max_user_turns,
        max_consecutive_invalid_calls=options.max_consecutive_invalid_calls,
        deadline_s=options.conversation_deadline_s,
        sampling={key: value for key, value in sampling.items() if key not in NOT_SAMPLING},
    )


def _options(config: Any) -> TrainerOptions:
    return checked_options(
        TrainerOptions,
        dict(config.engine_kwargs or {}).get("turntrace") or {},
        "rollout.engine_kwargs.turntrace",
    )


def checked_options(kind: type[Options], given: Mapping[str, Any], where: str) -> Options:
    """The options as `kind`. Raises ConfigError, one line, naming the key that is wrong and those that there are."""
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *map(str, first["loc"])])
        raise ConfigError(
            f"{key}: {first['msg']}; the keys are {', '.join(kind.model_fields)}"
        ) from error


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON values, without secrets; what has no JSON form becomes its text."""
    plain: dict[str, Any] = without_secrets(json.loads(json.dumps(value, default=str)))
    return plain
