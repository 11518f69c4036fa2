"""The model under load: the shape of Qwen3-0.6B with random weights, and weights to send to an engine.

A runtime's cost per token does not depend on what the weights are, so nothing has to be downloaded; only the tokenizer
must be a real one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers import npm_models

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
"""https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json"""


def qwen3_shape(target: Path) -> Path:
    """A model folder without weights, for `load_format: dummy`."""
    shutil.copytree(npm_models("qwen3"), target)
    (target / "config.json").write_text(json.dumps(QWEN3_06B))
    return target


def random_weights(model: Path, seed: int, device: str) -> Iterator[tuple[str, Any]]:
    """Every weight of the model by its Hugging Face name, drawn anew, one at a time; the same for the same seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shapes = [
            (name, weight.shape) for name, weight in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).named_parameters()
        ]
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes:
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
        else:
            yield name, torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02, generator=generator)
