"""config.yaml: `model_path` and `rollout:`, every key in verl's names, checked whole before anything starts.

Invariant: a `Config` that exists can be run; whatever is wrong with a file is one `ConfigError` line that says where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from agent.config.checks import notices, refusals
from agent.config.hints import hint, sglang_arguments
from agent.config.schema import ConfigFile, Rollout
from agent.config.secrets import without_secrets
from agent.errors import ConfigError
from agent.model.base import BASE_NAME, TOOLS_NAME, resolve_model, resolve_tokenizer

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
"""The config without a file: the embedded model on the SGLang engine, in sizes that a machine without a GPU carries."""

PATH_KEYS = (
    "model_path",
    "rollout.multi_turn.tool_config_path",
    "rollout.multi_turn.interaction_config_path",
    "rollout.turntrace.recorded",
)
"""Keys that name a file or a folder."""


@dataclass(frozen=True, slots=True)
class Config:
    """A checked config. `given` are the dotted paths that the user wrote, in the file or with --set.

    `seed` is the engine's, which SGLang would otherwise draw and not tell.
    """

    model_path: str
    rollout: Rollout
    path: Path | None = None
    given: tuple[str, ...] = ()
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        """Tokens a whole conversation may have."""
        rollout = self.rollout
        return rollout.max_model_len or rollout.prompt_length + rollout.response_length

    @property
    def max_assistant_turns(self) -> int:
        """Turns a conversation may sample: 1 without multi_turn, `max_model_len // 3` (verl's own) where no limit is set."""
        multi_turn = self.rollout.multi_turn
        if not multi_turn.enable:
            return 1
        return multi_turn.max_assistant_turns or max(1, self.max_model_len // 3)

    @property
    def tool_config_path(self) -> str | None:
        """The tools to offer: a file, or the bare name of a shipped config; None without multi_turn."""
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
        """The local directory of `model_path`; engines elsewhere have their own weights, and only the tokenizer counts here.

        Raises ConfigError where there is none. The embedded model is built on first use.
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
        """SGLang's sampling params that hold for a whole run; budgets and stop ids are the loop's. Greedy is temperature 0."""
        source = self.rollout.val_kwargs if validate else self.rollout
        params: dict[str, Any] = {
            "temperature": source.temperature,
            "top_p": source.top_p,
            "top_k": source.top_k,
        }
        if not source.do_sample or source.temperature == 0:
            params = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
        return {**params, "ignore_eos": self.rollout.ignore_eos}

    def notices(self) -> list[str]:
        """What the user should hear before a run: warnings, and each key they wrote that has no effect, with the reason."""
        prefix = "rollout."
        return notices(
            self.rollout,
            [path.removeprefix(prefix) for path in self.given if path.startswith(prefix)],
        )

    def verl_rollout(self) -> dict[str, Any]:
        """Plain values for the fields of verl's `RolloutConfig`, nested ones as dicts, all given."""
        values = self.rollout.model_dump(
            exclude={"turntrace": True, "server": {"urls", "api_key"}, "engine_kwargs": {"vllm"}}
        )
        values |= {
            "name": "sglang",
            "max_model_len": self.max_model_len,
            "skip_tokenizer_init": True,
        }
        values["multi_turn"]["max_assistant_turns"] = self.max_assistant_turns
        values["engine_kwargs"]["sglang"]["random_seed"] = self.seed
        if (
            self.rollout.cudagraph_capture_sizes
        ):  # SGLangRollout drops it, SGLang has it by another name
            values["engine_kwargs"]["sglang"].setdefault(
                "cuda_graph_bs", self.rollout.cudagraph_capture_sizes
            )
        return values

    def resolved(self) -> dict[str, Any]:
        """The whole config as JSON values, defaults filled in, secrets left out: what run.json keeps."""
        values: dict[str, Any] = without_secrets(self.rollout.model_dump(mode="json"))
        values |= {"max_model_len": self.max_model_len}
        return {"model_path": self.model_path, "rollout": values}


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    recorded: Mapping[str, Any] | None = None,
) -> Config:
    """Reads and checks a config file (None: the embedded default) with `key.path=value` overrides, values in YAML.

    `recorded` is a run's config as `resolved` wrote it, to be used where there is no file: the paths in it are taken as
    they are. Raises ConfigError, one line, for whatever in it cannot work.
    """
    file = Path(path) if path is not None else None
    assignments = [_split(override) for override in overrides]
    default = "the embedded config" if recorded is None else "the run's config"
    origin = _Origin(str(file or default), tuple(key for key, _ in assignments))
    values = _copy(_read(file) if file else EMBEDDED if recorded is None else recorded)
    given = list(_leaves(values)) if file else []
    for key, value in assignments:
        _put(values, key, value)
        given += _leaves({key: value})
    _refuse_odd_values(values, origin)
    paths = (
        PATH_KEYS
        if recorded is None or file
        else [key for key in PATH_KEYS if key in origin.overridden]
    )
    _resolve_paths(values, paths, file, origin)
    return replace(_validated(values, dict.fromkeys(given), origin), path=file)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a key was written, for the beginning of a message."""

    source: str
    overridden: tuple[str, ...]

    def where(self, key: str = "") -> str:
        if any(
            f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")
            for name in self.overridden
            if key
        ):
            return f"--set {key}"
        return f"{self.source}: {key}".removesuffix(": ")


def _validated(values: dict[str, Any], given: Iterable[str], origin: _Origin) -> Config:
    try:
        checked = ConfigFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, origin)) from None
    for key in checked.rollout.engine_kwargs.sglang if checked.rollout.name == "sglang" else ():
        _check_sglang_argument(key, origin)
    for key, text in refusals(checked.rollout):
        raise ConfigError(f"{origin.where(f'rollout.{key}')}: {text}")
    return Config(
        checked.model_path, checked.rollout, None, tuple(given), _seed(checked.rollout, origin)
    )


def _seed(rollout: Rollout, origin: _Origin) -> int:
    seed = rollout.engine_kwargs.sglang.get("random_seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(
            f"{origin.where('rollout.engine_kwargs.sglang.random_seed')}: must be a whole number, got {seed!r:.80}"
        )
    return seed or 0


def _check_sglang_argument(name: str, origin: _Origin) -> None:
    known = sglang_arguments()
    key = f"rollout.engine_kwargs.sglang.{name}"
    if known and name not in known:
        raise ConfigError(f"{origin.where(key)}: unknown key of SGLang's ServerArgs; {hint(key)}")


def _describe(error: ValidationError, origin: _Origin) -> str:
    """The first of pydantic's findings as one line, unknown keys before wrong values."""
    found = sorted(
        error.errors(include_url=False, include_context=False),
        key=lambda item: item["type"] != "extra_forbidden",
    )
    first, more = found[0], len(found) - 1
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"{origin.where(key)}: unknown key; {hint(key)}"
    elif first["type"] == "missing":
        text = f"{origin.where(key)}: is missing; name a model folder or Hugging Face id, or smollm2-tools for the embedded model"
    elif first["type"] in ("model_type", "dict_type"):
        text = f"{origin.where(key)}: must be a mapping of keys, got {_shown(key, first['input'])}"
    else:
        text = f"{origin.where(key)}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_shown(key, first['input'])}"
    return f"{text} (and {more} more)" if more else text


def _shown(key: str, value: object) -> str:
    if key.endswith("api_key"):
        return type(value).__name__
    text = f"{type(value).__name__} {value!r:.80}"
    try:
        number = float(value) if isinstance(value, str) and "e" in value.lower() else None
    except ValueError:
        number = None
    return text if number is None else f"{text} (YAML reads that as text; write {number!r})"


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key written twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such config file; check the path given with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a UTF-8 text file: {error}") from error
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(file, error)) from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{file}: must hold `model_path:` and `rollout:`, found {found}")
    return values


def _yaml_problem(file: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{file}{line}: not valid YAML: {problem}"


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"--set {override}: write it as key.path=value, such as --set rollout.temperature=0.7"
        )
    try:
        return key, yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not valid YAML; quote it") from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {name} holds {values!r:.80}, not a mapping of keys")
    values[last] = value


def _copy(value: Any) -> Any:
    """A deep copy of plain values without verl's `_target_` keys, which say what these tables already know."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items() if key != "_target_"}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _refuse_odd_values(value: Any, origin: _Origin, key: str = "") -> None:
    """Interpolation would reach the engine as text, and a number that JSON has not could not be kept in run.json."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{origin.where(key)}: {value!r:.80}: OmegaConf interpolation is not resolved here; write the value itself"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"{origin.where(key)}: {value} is not a finite number; leave the key out for its default"
        )
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in items:
        _refuse_odd_values(item, origin, f"{key}.{name}".removeprefix("."))


def _resolve_paths(
    values: dict[str, Any], keys: Iterable[str], file: Path | None, origin: _Origin
) -> None:
    """Makes file names absolute. A bare name that is no file stays: a shipped tool config, an embedded model, a hub id."""
    for key in keys:
        parent, _, last = key.rpartition(".")
        section = _section(values, parent)
        text = section.get(last)
        if (
            not isinstance(text, str)
            or text in (BASE_NAME, TOOLS_NAME)
            or (last == "tool_config_path" and _is_bare(text))
        ):
            continue
        if found := _find(text, file):
            section[last] = str(found)
        elif last != "model_path":
            raise ConfigError(
                f"{origin.where(key)}: there is no {text}, neither beside the config file nor in {Path.cwd()}"
            )


def _section(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The mapping at a dotted path; an empty one where the file has none there, or something else."""
    section: Any = values
    for name in filter(None, path.split(".")):
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}


def _is_bare(name: str) -> bool:
    """A shipped tool config's name, such as `gsm8k`."""
    return Path(name).name == name and not Path(name).suffix


def _find(name: str, file: Path | None) -> Path | None:
    """The existing path that `name` means, beside the config file or else in the current folder."""
    bases = [file.parent, Path.cwd()] if file else [Path.cwd()]
    candidates = (base / Path(name).expanduser() for base in bases)
    return next((path.resolve() for path in candidates if path.exists()), None)
