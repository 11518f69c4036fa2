"""A verl trainer's config as turntrace's own: options, limits, tools, and what a run folder keeps
of it.

verl's rollout config may be of any version: `RolloutConfig` of 0.6.1, an OmegaConf node of 0.8 and
0.9.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from agent.config.config import Config
from agent.config.schema import Rollout
from agent.config.secrets import without_secrets
from agent.errors import ConfigError
from agent.runs.manifest import processor_entry, source, versions
from agent.runs.parts import Parts

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
    "format",
    "max_assistant_turns",
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
    "format_unproven",
    "calls_in_thoughts",
)


class TrainerOptions(pydantic.BaseModel):
    """`rollout.engine_kwargs.turntrace` in a trainer's config.

    Keys mean what they mean under `rollout.turntrace` outside of a trainer. `save_to`: a folder
    that gets a run folder for each batch, `train-STEP-rank-R` or `val-STEP-rank-R`.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    apply_chat_template_kwargs: dict[str, Any] = {}
    format_unproven: bool = False
    calls_in_thoughts: bool = False
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


def trainer_config(
    model: str,
    config: Any,
    options: TrainerOptions,
    *,
    max_model_len: int | None = None,
    **multi_turn: Any,
) -> Config:
    """What of a trainer's config takes effect, as turntrace's own: its runs are made from it.

    `config` is verl's rollout config; `max_model_len` and `multi_turn` replace its keys of those
    names. A key that the version of verl does not have, or has as null, counts with our default.
    Raises ConfigError if a value is out of range or `format` is no call format.
    """
    longest = config.prompt_length + config.response_length
    turns = {**{key: config.multi_turn.get(key) for key in TURN_KEYS}, **multi_turn}
    values = {
        **_given({key: config.get(key) for key in ROLLOUT_KEYS}),
        "max_model_len": min(max_model_len or config.max_model_len or longest, longest),
        "multi_turn": {**_given(turns), "enable": True},
        "turntrace": {key: getattr(options, key) for key in OUR_KEYS},
    }
    try:
        return Config(model, Rollout.model_validate(plain(values)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"rollout.{key}: {first['msg']}, got {first['input']!r}") from error


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def engine_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Those of verl's sampling params that are the engine's."""
    return {key: value for key, value in sampling.items() if key not in NOT_SAMPLING}


def manifest(parts: Parts, trainer: Mapping[str, Any], **which: Any) -> dict[str, Any]:
    """A run.json. `trainer` is the trainer's own config, `which` names the batch."""
    return {
        "config": parts.config.resolved(),
        "call_format": parts.template.format_entry() if parts.tools else None,
        "image_processor": processor_entry(parts.template),
        "tools": source(parts.tools),
        "interactions": source(parts.interactions),
        **which,
        "trainer": plain(trainer),
        "versions": versions(),
        "parent": None,
    }


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON values, without secrets; a value without a JSON form becomes its text."""
    values: dict[str, Any] = without_secrets(json.loads(json.dumps(value, default=str)))
    return values
