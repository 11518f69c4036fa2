"""A verl trainer's config as turntrace's own: options, limits, tools, and what a run folder keeps
of it.

verl's rollout config may be of any version: `RolloutConfig` of 0.6.1, an OmegaConf node of 0.8 and
0.9.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from agent.config.secrets import without_secrets
from agent.errors import ConfigError
from agent.loop.calls import Dispatcher
from agent.loop.loop import LoopSettings
from agent.loop.users import Interactions
from agent.runs.manifest import source, versions
from conversations.template import ChatTemplate
from conversations.tokens import TOOL
from conversations.truncate import cut_to_tokens
from tools.toolset import ToolSet

Options = TypeVar("Options", bound=pydantic.BaseModel)

NOT_SAMPLING = frozenset(
    {"n", "max_new_tokens", "skip_special_tokens", "spaces_between_special_tokens"}
)
"""Of verl's sampling params, those that the loop sets itself and those that only texts have."""

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


class TrainerOptions(pydantic.BaseModel):
    """`rollout.engine_kwargs.turntrace` in a trainer's config.

    Keys mean what they mean under `rollout.turntrace` outside of a trainer. `save_to`: a folder
    that gets a run folder for each batch, `train-STEP-rank-R` or `val-STEP-rank-R`.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    apply_chat_template_kwargs: dict[str, Any] = {}
    max_consecutive_invalid_calls: pydantic.PositiveInt | None = 8
    conversation_deadline_s: pydantic.PositiveFloat | None = None
    max_tokens: pydantic.PositiveInt | None = None
    save_to: Path | None = None


def rollout_options(config: Any) -> TrainerOptions:
    """The options of a verl 0.6.1 rollout config. Raises ConfigError."""
    given = dict(config.engine_kwargs or {}).get("turntrace") or {}
    return checked_options(TrainerOptions, given, "rollout.engine_kwargs.turntrace")


def checked_options(kind: type[Options], given: Mapping[str, Any], where: str) -> Options:
    """The options as `kind`.

    Raises ConfigError, one line, naming the wrong key and the keys that exist.
    """
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *map(str, first["loc"])])
        raise ConfigError(
            f"{key}: {first['msg']}; the keys are {', '.join(kind.model_fields)}"
        ) from error


def tool_dispatcher(
    tools: ToolSet | None, template: ChatTemplate, multi_turn: Any
) -> Dispatcher | None:
    """The tools under the limits of verl's `multi_turn` config; None if there are no tools.

    Raises TemplateError if the template has no tool turns, ConfigError if `format` names another
    form of tool calls than hermes.
    """
    if not tools:
        return None
    template.require(TOOL)
    if (form := multi_turn.get("format", "hermes")) != "hermes":
        raise ConfigError(
            f"rollout.multi_turn.format: {form}: only hermes tool calls "
            "(<tool_call>{...}</tool_call>) are read"
        )
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    cut = functools.partial(cut_to_tokens, template=template, limit=limit, side=side)
    return Dispatcher(tools, max_parallel_calls=multi_turn.max_parallel_calls or 16, cut=cut)


def loop_settings(
    config: Any, options: TrainerOptions, sampling: Mapping[str, Any]
) -> LoopSettings:
    """The budgets of verl's rollout config, and those of verl's sampling params that are the
    engine's.
    """
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


def run_config(
    model: str, config: Any, settings: LoopSettings, options: TrainerOptions, **paths: Any
) -> dict[str, Any]:
    """A run.json's `config` in turntrace's own keys: what took effect.

    With it the run can be verified and replayed. A key that the version of verl does not have is
    left out. `paths` replace the trainer's own.
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
    """A run.json.

    `config` is what `run_config` makes, `trainer` the trainer's own config, `which` names the
    batch.
    """
    texts = {"tools": source(tools), "interactions": source(interactions)}
    return {
        "config": config,
        **texts,
        **which,
        "trainer": _plain(trainer),
        "versions": versions(),
        "parent": None,
    }


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON values, without secrets; a value without a JSON form becomes its text."""
    plain: dict[str, Any] = without_secrets(json.loads(json.dumps(value, default=str)))
    return plain
