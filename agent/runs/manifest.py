"""What a run folder says about its run: run.json, and the tokenizer beside it.

Invariant: the fields that a resume compares hold no secret, and nothing that changes from one start
to the next.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.config.config import Config
from agent.config.secrets import hidden_in, hidden_in_yaml
from agent.loop.tasks import task_file_hash
from agent.model.base import ADAPTER_DIR, TOOLS_NAME
from conversations.errors import RunFolderError
from conversations.run.open_run import TOKENIZER
from conversations.run.store import RUN, TRAJECTORIES, read_manifest

if TYPE_CHECKING:
    from agent.loop.users import Interactions
    from conversations.template import ChatTemplate
    from tools.toolset import ToolSet

PACKAGES = ("turntrace", "verl", "sglang", "torch", "transformers", "tokenizers")
WHOLE_FILE = 1 << 30
"""A model file of more bytes is hashed in part: its size and both ends."""
_END = 1 << 20
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
)


def run_manifest(
    config: Config,
    tasks: Path | None,
    tools: ToolSet | None = None,
    interactions: Interactions | None = None,
    *,
    limit: int | None,
    validate: bool,
    argv: Sequence[str],
) -> dict[str, Any]:
    """The fields of run.json without schema and counts. All values are JSON.

    `tasks` is None if conversations come from elsewhere, as a gateway's do.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(argv),
        "config": config.resolved(),
        "tools": source(tools),
        "interactions": source(interactions),
        "model": model_entry(config),
        "tasks": {"file": tasks.name, "sha256": task_file_hash(tasks)} if tasks else None,
        "limit": limit,
        "n": config.n(validate),
        "validate": validate,
        "seed": config.seed if config.rollout.name == "sglang" else None,
        "versions": versions(),
        "parent": None,
    }


def fresh_seed(config: Config, folder: Path) -> Config:
    """The config with another seed than that of the run in `folder`.

    It is unchanged if there is no run, or if the run has no seed.
    """
    seed = read_manifest(folder).get("seed") if (folder / RUN).exists() else None
    return replace(config, seed=seed + 1) if isinstance(seed, int) else config


def save_tokenizer(run: Path, tokenizer: Any) -> None:
    """Writes the tokenizer into the run folder. Raises RunFolderError if it cannot be written.

    Call it before the engine starts: then a full disk is reported in a second, not after a minute.
    """
    folder = run / TOKENIZER
    try:
        folder.mkdir(exist_ok=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception for a full disk
        raise RunFolderError(
            f"{folder} cannot be written: {error}; make room there, or choose another --out"
        ) from error


def processor_entry(template: ChatTemplate) -> dict[str, Any] | None:
    """`image_processor` of a run.json: name, settings and their hash; None for a model without."""
    return template.images.as_json() if template.images else None


def source(loaded: ToolSet | Interactions | None) -> str | None:
    """The YAML that tools or interactions came from, secrets hidden; None if there are none."""
    return hidden_in_yaml(loaded.source_text) if loaded else None


def command_line(argv: Sequence[str]) -> str:
    """The command as a shell takes it, keys and passwords hidden."""
    return shlex.join(["turntrace", *map(hidden_in, argv)])


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run depends on; None if not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def parent_entry(run: Path) -> dict[str, Any]:
    """`parent` of a run made from another run: its name, its path, and the hashes of its files."""
    hashes = {
        f"{name}_sha256": task_file_hash(run / file)
        for name, file in (("run", RUN), ("trajectories", TRAJECTORIES))
    }
    return {"run": run.resolve().name, "path": str(run.resolve()), **hashes}


def model_entry(config: Config) -> dict[str, Any]:
    """The model's path and hashes. If a server has the weights, only the tokenizer is hashed."""
    return {"path": config.model_path, **_model(config, config.model_dir())}


def _model(config: Config, folder: Path) -> dict[str, Any]:
    tokenizer = {"tokenizer_sha256": model_hash(folder, TOKENIZER_FILES)["sha256"]}
    if config.rollout.name != "sglang":
        return {"sha256": None, **tokenizer}
    return {**model_hash(folder), **tokenizer, **_adapter(config)}


def model_hash(folder: Path, names: Sequence[str] = ("*",)) -> dict[str, Any]:
    """The hash of a model's files.

    `sha256` covers the names and contents of the files that match `names`; `hashed_in_part` names
    the files of which only size and both ends count.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name[0] != "." and any(map(path.match, names))
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:{_file_hash(path)}\n".encode())
    return {
        "sha256": digest.hexdigest(),
        "hashed_in_part": [path.name for path in files if path.stat().st_size > WHOLE_FILE],
    }


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size <= WHOLE_FILE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        head = file.read(_END)
        file.seek(-_END, 2)
        return hashlib.sha256(head + file.read()).hexdigest()


def _adapter(config: Config) -> dict[str, str]:
    weights = ADAPTER_DIR / "adapter_model.safetensors"
    return (
        {"adapter_sha256": _file_hash(weights)}
        if config.model_path == TOOLS_NAME and weights.is_file()
        else {}
    )
