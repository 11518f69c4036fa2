"""The plain values of a config: read from YAML, overridden with --set, file names made absolute."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agent.errors import ConfigError
from agent.model.base import BASE_NAME, TOOLS_NAME, VISION_NAME

PATH_KEYS = (
    "model_path",
    "rollout.multi_turn.tool_config_path",
    "rollout.multi_turn.interaction_config_path",
    "rollout.turntrace.recorded",
)
"""Keys that name a file or a folder."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where keys were written: in the file `source`, or with --set (`overridden`)."""

    source: str
    overridden: tuple[str, ...]

    def where(self, key: str = "") -> str:
        """The beginning of a message about `key`."""
        if key and self.is_overridden(key):
            return f"--set {key}"
        return f"{self.source}: {key}".removesuffix(": ")

    def is_overridden(self, key: str) -> bool:
        """Whether --set wrote `key`, a part of it, or what it is in."""
        return any(_overlap(key, name) for name in self.overridden)


def _overlap(key: str, name: str) -> bool:
    """Whether one of two dotted paths lies inside the other."""
    return f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")


# ---------------------------------------------------------------------- YAML


class Loader(yaml.SafeLoader):
    """YAML's safe loader, with two differences.

    A key written twice is an error, where YAML would take the last one. `1e-6` is a number, as in
    verl's own configs (OmegaConf); YAML 1.1 would read it as text.
    """

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


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_file(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError, one line."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a UTF-8 text file: {error}") from error
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(file, error)) from error
    if not isinstance(values, dict):
        content = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{file}: must hold `model_path:` and `rollout:`, found {content}")
    return values


def _yaml_problem(file: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{file}{line}: not valid YAML: {problem}"


# ---------------------------------------------------------------------- overrides


def split_override(override: str) -> tuple[str, Any]:
    """`key.path=value` as the path and its value, read as YAML. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"--set {override}: write it as key.path=value, such as --set rollout.temperature=0.7"
        )
    try:
        return key, yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not valid YAML; quote it") from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value at a dotted path; missing mappings are made. Raises ConfigError."""
    *parents, last = key.split(".")
    for name in parents:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {name} holds {values!r:.80}, not a mapping of keys")
    values[last] = value


def copy(value: Any) -> Any:
    """A deep copy without verl's `_target_` keys, which name its dataclasses."""
    if isinstance(value, dict):
        return {key: copy(item) for key, item in value.items() if key != "_target_"}
    return [copy(item) for item in value] if isinstance(value, list) else value


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all values that are no mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def refuse_odd_values(value: Any, origin: Origin, key: str = "") -> None:
    """Raises ConfigError for interpolation, and for a number that JSON does not have."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{origin.where(key)}: {value!r:.80}: OmegaConf interpolation is not resolved here; "
            "write the value itself"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"{origin.where(key)}: {value} is not a finite number; "
            "leave the key out for its default"
        )
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_odd_values(item, origin, f"{key}.{name}".removeprefix("."))
    if isinstance(value, list):
        for index, item in enumerate(value):
            refuse_odd_values(item, origin, f"{key}.{index}")


# ---------------------------------------------------------------------- paths


def resolve_paths(
    values: dict[str, Any], keys: Iterable[str], file: Path | None, origin: Origin
) -> None:
    """Makes file names absolute. Raises ConfigError if there is no such file.

    A bare name that is no file stays: it is a shipped tool config, an embedded model or a hub id.
    """
    for key in keys:
        parent, _, last = key.rpartition(".")
        section = _section(values, parent)
        text = section.get(last)
        if not isinstance(text, str) or _is_a_name(text, last):
            continue
        if path := _existing(text, file):
            section[last] = str(path)
        elif last != "model_path":
            raise ConfigError(
                f"{origin.where(key)}: there is no {text}, neither beside the config file "
                f"nor in {Path.cwd()}"
            )


def _section(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The mapping at a dotted path; an empty one if there is none."""
    section: Any = values
    for name in filter(None, path.split(".")):
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}


def _is_a_name(text: str, key: str) -> bool:
    """An embedded model, or a shipped tool config such as `gsm8k`."""
    if text in (BASE_NAME, TOOLS_NAME, VISION_NAME):
        return True
    is_bare = Path(text).name == text and not Path(text).suffix
    return key == "tool_config_path" and is_bare


def _existing(name: str, file: Path | None) -> Path | None:
    """The existing path that `name` means: beside the config file, else in the current folder."""
    bases = [file.parent, Path.cwd()] if file else [Path.cwd()]
    candidates = (base / Path(name).expanduser() for base in bases)
    return next((path.resolve() for path in candidates if path.exists()), None)
