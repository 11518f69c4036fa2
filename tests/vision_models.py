"""Tiny models of Qwen's vision shapes with random weights, as folders an engine starts from.

Configs and names of weights are as the published checkpoints have them. The tokenizer is SmolLM2's
with the vision tokens, the template the product's own with tools and images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.engines import cpu_guards
from agent.model.base import base_model_dir
from agent.model.vision import SPECIAL, write_vision_tokenizer
from conversations.tokenizer import FileTokenizer
from tests.vision import processor_settings

HIDDEN, HEAD = 128, 32
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
MROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}
SHARED = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **SHARED,
        "embed_dim": 64,
        "hidden_size": HIDDEN,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "in_channels": 3,
        "spatial_patch_size": 14,
        "hidden_act": "quick_gelu",
    },
    "qwen2_5_vl": {
        **SHARED,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_chans": 3,
        "in_channels": 3,
        "out_hidden_size": HIDDEN,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {
        **SHARED,
        "patch_size": 16,
        "model_type": "qwen3_vl",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_channels": 3,
        "num_position_embeddings": 2304,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0, 1],
    },
}
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
SEED = 0


def write_tiny_model(folder: Path, shape: str, *, seed: int = SEED) -> Path:
    """Writes a model of that shape, 7 million weights in bfloat16."""
    from safetensors.torch import save_file

    write_vision_tokenizer(base_model_dir(), folder)
    settings = processor_settings(shape)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    video = {key: value for key, value in settings.items() if key != "image_processor_type"}
    video["video_processor_type"] = (
        "Qwen3VLVideoProcessor" if shape == "qwen3_vl" else "Qwen2VLVideoProcessor"
    )
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    tokenizer_file = folder / "tokenizer_config.json"
    named = json.loads(tokenizer_file.read_text()) | {
        "processor_class": settings["processor_class"]
    }
    tokenizer_file.write_text(json.dumps(named))
    config = model_config(FileTokenizer(folder), shape)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(folder, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(folder: Path, seed: int) -> dict[str, Any]:
    """Random weights for the config in `folder`, by the names of a published checkpoint."""
    cpu_guards.install()  # transformers 5's models of images import torchvision
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return {
        _published(name, config.model_type): value.contiguous().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }


def _published(name: str, shape: str) -> str:
    if shape == "qwen3_vl":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def model_config(tokenizer: Any, shape: str) -> dict[str, Any]:
    """The config.json of that shape for a tokenizer that has the vision tokens."""
    backend = tokenizer.backend_tokenizer
    special = {name: backend.token_to_id(token) for name, token in SPECIAL.items()}
    vocabulary = -(-backend.get_vocab_size() // 64) * 64
    text = {**TEXT, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    whole = {
        "architectures": [ARCHITECTURES[shape]],
        "model_type": shape,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        **special,
        "vision_config": TOWERS[shape],
    }
    if shape != "qwen3_vl":
        window = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
        return {**text, **window, **whole, "rope_scaling": MROPE}
    rope = {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"}
    own = {"head_dim": HEAD, "attention_bias": False, "model_type": "qwen3_vl_text"}
    return {**whole, "text_config": {**text, **own, "rope_scaling": rope}}
