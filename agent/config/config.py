"""config.yaml: `model_path` and `rollout:`, in verl's names, checked before anything starts.

Invariant: a `Config` that exists can be run. Everything wrong with a file is one `ConfigError` line
that says where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.config.fates import Use, notices, refusals
from agent.config.hints import hint
from agent.config.installed import sglang_arguments
from agent.config.schema import FATES, ConfigFile, Rollout
from agent.config.secrets import without_secrets
from agent.config.values import (
    PATH_KEYS,
    Origin,
    copy,
    leaves,
    put,
    read_file,
    refuse_odd_values,
    resolve_paths,
    split_override,
)
from agent.errors import ConfigError
from agent.model.base import resolve_model, resolve_tokenizer

EMBEDDED: dict[str, Any] = {
    "model_path": "smollm2-tools",
    "rollout": {
        "name": "sglang",
        "prompt_length": 1024,
        "response_length": 1024,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.2,
        "multi_turn": {"enable": True, "max_assistant_turns": 8, "max_tool_response_length": 256},
    },
}
"""The config without a file: the embedded model on SGLang, in sizes for a machine without a GPU."""


@dataclass(frozen=True, slots=True)
class Config:
    """A checked config.

    `given` are the dotted paths that the user wrote, in the file or with --set.

    `seed` is the engine's; without it SGLang would draw one and not report it.
    """

    model_path: str
    rollout: Rollout
    path: Path | None = None
    given: tuple[str, ...] = ()
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        """Tokens a conversation may have, prompt included."""
        rollout = self.rollout
        return rollout.max_model_len or rollout.prompt_length + rollout.response_length

    @property
    def max_assistant_turns(self) -> int:
        """Turns a conversation may sample: 1 without multi_turn.

        Without a limit it is `max_model_len // 3`, as in verl.
        """
        multi_turn = self.rollout.multi_turn
        if not multi_turn.enable:
            return 1
        return multi_turn.max_assistant_turns or max(1, self.max_model_len // 3)

    @property
    def tool_config_path(self) -> str | None:
        """The tool config: a file, or a shipped one's bare name; None without multi_turn."""
        multi_turn = self.rollout.multi_turn
        return multi_turn.tool_config_path if multi_turn.enable else None

    @property
    def interaction_config_path(self) -> Path | None:
        """The interactions that may take user turns; None without multi_turn."""
        multi_turn = self.rollout.multi_turn
        return (
            Path(multi_turn.interaction_config_path)
            if multi_turn.enable and multi_turn.interaction_config_path
            else None
        )

    @property
    def api_key(self) -> str | None:
        """The key for `server.urls`: the config's, else the environment's SGLANG_API_KEY."""
        return self.rollout.server.api_key or os.environ.get("SGLANG_API_KEY")

    def model_dir(self) -> Path:
        """The local folder of `model_path`. The embedded model is built on first use.

        Engines elsewhere have their own weights: then a folder with the tokenizer will do. Raises
        ConfigError if there is none.
        """
        return (
            resolve_model(self.model_path)
            if self.rollout.name == "sglang"
            else resolve_tokenizer(self.model_path)
        )

    def n(self, validate: bool = False) -> int:
        """Samples of each task."""
        return self.rollout.val_kwargs.n if validate else self.rollout.n

    def sampling(self, validate: bool = False) -> dict[str, Any]:
        """SGLang's sampling params of a run, without budgets and stop ids, which the loop sets.
        Greedy is temperature 0.
        """
        source = self.rollout.val_kwargs if validate else self.rollout
        params: dict[str, Any] = {
            "temperature": source.temperature,
            "top_p": source.top_p,
            "top_k": source.top_k,
        }
        if not source.do_sample or source.temperature == 0:
            params = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
        return {**params, "ignore_eos": self.rollout.ignore_eos}

    def notices(self, use: Use = "run") -> list[str]:
        """Warnings, and the keys the user wrote that have no effect in this use, and why."""
        prefix = "rollout."
        given = [path.removeprefix(prefix) for path in self.given if path.startswith(prefix)]
        return notices(FATES, self.rollout, given, use)

    def verl_rollout(self) -> dict[str, Any]:
        """Plain values for all fields of verl's `RolloutConfig`, nested ones as dicts."""
        values = self.rollout.model_dump(
            exclude={
                "turntrace": True,
                "server": {"urls", "api_key"},
                "multi_turn": {"context"},
                "engine_kwargs": {"vllm"},
            }
        )
        # verl refuses lengths that do not fit together, as a gateway's need not: its sessions have
        # more than one sequence. Its engine reads max_model_len alone.
        response = min(self.rollout.response_length, self.max_model_len - 1)
        values |= {
            "name": "sglang",
            "prompt_length": min(self.rollout.prompt_length, self.max_model_len - response),
            "response_length": response,
            "max_model_len": self.max_model_len,
            "skip_tokenizer_init": True,
        }
        values["multi_turn"]["max_assistant_turns"] = self.max_assistant_turns
        values["engine_kwargs"]["sglang"]["random_seed"] = self.seed
        if self.rollout.turntrace.evidence.routed_experts:
            values["engine_kwargs"]["sglang"]["enable_return_routed_experts"] = True
        if sizes := self.rollout.cudagraph_capture_sizes:  # SGLangRollout drops it
            values["engine_kwargs"]["sglang"].setdefault("cuda_graph_bs", sizes)
        return values

    def resolved(self) -> dict[str, Any]:
        """The config as run.json keeps it: JSON values, defaults filled in, secrets left out."""
        values: dict[str, Any] = without_secrets(self.rollout.model_dump(mode="json"))
        values |= {"max_model_len": self.max_model_len}
        return {"model_path": self.model_path, "rollout": values}


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    recorded: Mapping[str, Any] | None = None,
    starts_engine: bool = True,
) -> Config:
    """Reads and checks a config file (None: the embedded default).

    `overrides` are `key.path=value`, values in YAML. `recorded` takes the place of a file: a run's
    config as `resolved` wrote it, or a trainer's in the same keys. Its paths are taken as they are.
    If no engine starts, it may name arguments that only another version of SGLang has.
    Raises ConfigError, one line, with everything in it that cannot work.
    """
    file = Path(path) if path is not None else None
    assignments = [split_override(override) for override in overrides]
    default = "the embedded config" if recorded is None else "the run's config"
    origin = Origin(str(file or default), tuple(key for key, _ in assignments))
    values = copy(read_file(file) if file else EMBEDDED if recorded is None else recorded)
    given = list(leaves(values)) if file else []
    for key, value in assignments:
        put(values, key, value)
        given += leaves({key: value})
    refuse_odd_values(values, origin)
    is_recorded = recorded is not None and file is None
    paths = [key for key in PATH_KEYS if not is_recorded or key in origin.overridden]
    resolve_paths(values, paths, file, origin)
    unknown = [
        key
        for key in _unknown_sglang_arguments(values)
        if starts_engine or not is_recorded or origin.is_overridden(key)
    ]
    checked = _checked(values, origin, unknown)
    seed = _seed(checked.rollout, origin)
    return Config(checked.model_path, checked.rollout, file, tuple(dict.fromkeys(given)), seed)


def _checked(values: dict[str, Any], origin: Origin, unknown: list[str]) -> ConfigFile:
    """The values as a `ConfigFile`.

    Raises ConfigError with all problems: unknown keys, those in `unknown` too, then wrong values.
    """
    try:
        checked = ConfigFile.model_validate(values)
    except ValidationError as error:
        findings = error.errors(include_url=False, include_context=False)
        unknown += [_key(one) for one in findings if one["type"] == "extra_forbidden"]
        wrong = [
            f"{origin.where(_key(one))}: {_problem(one)}"
            for one in findings
            if one["type"] != "extra_forbidden"
        ]
        raise _error([*_unknown_keys(unknown, origin), *wrong]) from None
    refused = [
        f"{origin.where(f'rollout.{key}')}: {text}"
        for key, text in refusals(FATES, checked.rollout)
    ]
    if problems := [*_unknown_keys(unknown, origin), *refused]:
        raise _error(problems)
    return checked


def _error(problems: Sequence[str]) -> ConfigError:
    """All problems in one line."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} problems: {' | '.join(problems)}")


def _unknown_sglang_arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """Dotted paths under `engine_kwargs.sglang` that the installed SGLang does not have."""
    prefix = "rollout.engine_kwargs.sglang"
    rollout = values.get("rollout")
    given: Any = values
    for name in prefix.split("."):
        given = given.get(name) if isinstance(given, dict) else None
    known = sglang_arguments()
    if not isinstance(given, dict) or not isinstance(rollout, dict) or known is None:
        return
    if rollout.get("name", "sglang") == "sglang":
        yield from (f"{prefix}.{key}" for key in given if key not in known)


def _unknown_keys(keys: Sequence[str], origin: Origin) -> list[str]:
    """One phrase a key. An argument of SGLang's is unknown to its ServerArgs."""
    return [
        f"{origin.where(key)}: unknown key{_OF_SGLANG if _is_sglangs(key) else ''}; {hint(key)}"
        for key in keys
    ]


_OF_SGLANG = " of SGLang's ServerArgs"


def _is_sglangs(key: str) -> bool:
    return key.startswith("rollout.engine_kwargs.sglang.")


def _key(finding: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in finding["loc"])


def _problem(finding: Mapping[str, Any]) -> str:
    """What is wrong with a value, in pydantic's words."""
    if finding["type"] == "missing":
        if _key(finding) != "model_path":
            return "is missing"
        return (
            "is missing; name a model folder or Hugging Face id, or smollm2-tools for the "
            "embedded model"
        )
    value = finding["input"]
    is_secret = _key(finding).endswith("api_key")
    shown = type(value).__name__ if is_secret else f"{type(value).__name__} {value!r:.80}"
    if finding["type"] in ("model_type", "dict_type"):
        return f"must be a mapping of keys, got {shown}"
    number = _number(value) if isinstance(value, str) and not is_secret else None
    advice = f" (a text; write {number} without quotes)" if number else ""
    message = finding["msg"]
    return f"{message[0].lower()}{message[1:]}, got {shown}{advice}"


def _number(text: str) -> str | None:
    """A text that is a number, as YAML reads it back; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return repr(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _seed(rollout: Rollout, origin: Origin) -> int:
    seed = rollout.engine_kwargs.sglang.get("random_seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        where = origin.where("rollout.engine_kwargs.sglang.random_seed")
        raise ConfigError(f"{where}: must be a whole number, got {seed!r:.80}")
    return seed or 0
