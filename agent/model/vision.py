"""The embedded model in Qwen2.5-VL's shape: the same weights as its text model, and a small vision
tower that is blind.

Qwen2's text model is Llama's with biases on q, k and v, here zeros; M-RoPE of text is plain RoPE:
to the last bit the same log-probs for text as `smollm2-tools`. Four unused control tokens of the
vocabulary become the vision tokens, so no embedding grows. The tower's weights are drawn from a
seed and its last layer is zero: an image adds its tokens and nothing else. It is for tests and for
trying the machinery, not for answers about images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "vision_template.jinja"
TOKENS = {
    "<jupyter_text>": "<|vision_start|>",
    "<jupyter_code>": "<|vision_end|>",
    "<jupyter_output>": "<|image_pad|>",
    "<jupyter_script>": "<|video_pad|>",
}
"""SmolLM2's unused control tokens, and what they are renamed to."""
SPECIAL = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
PATCH, MERGE = 14, 2
MAX_TOKENS = 256
"""Of one image: its context is small."""
TOWER = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_chans": 3,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "spatial_patch_size": PATCH,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SEED = 0


def write_vision_model(source: Path, target: Path) -> None:
    """Writes the model in `source`, a Llama as this project builds it, in the other shape."""
    target.mkdir(parents=True)
    text = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ids = _write_tokenizer(source, target)
    (target / "config.json").write_text(json.dumps(_config(text, ids), indent=1))
    _write_processor(target)
    if (file := source / "generation_config.json").exists():
        shutil.copy(file, target)
    _write_weights(source, target, int(text["num_hidden_layers"]))


def write_vision_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer and the image processor alone."""
    target.mkdir(parents=True)
    _write_tokenizer(source, target)
    _write_processor(target)


def _write_tokenizer(source: Path, target: Path) -> dict[str, int]:
    """Writes the tokenizer with the vision tokens; returns their ids by their names in a config."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text(encoding="utf-8")
        for old, new in TOKENS.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (target / name).write_text(text, encoding="utf-8")
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    settings |= {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    shutil.copy(TEMPLATE, target / "chat_template.jinja")
    if (file := source / "special_tokens_map.json").exists():
        shutil.copy(file, target)
    added = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    vocabulary = {token["content"]: int(token["id"]) for token in added}
    return {name: vocabulary[token] for name, token in SPECIAL.items()}


def _config(text: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    half = hidden // heads // 2
    side = half * 3 // 8
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        **{key: text[key] for key in same},
        **{key: text.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "rope_theta": text.get("rope_theta") or text["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": text["max_position_embeddings"],
        "max_window_layers": text["num_hidden_layers"],
        **ids,
        "vision_config": {**TOWER, "out_hidden_size": hidden},
    }


def _write_processor(target: Path) -> None:
    settings = {
        "min_pixels": 56 * 56,
        "max_pixels": MAX_TOKENS * (PATCH * MERGE) ** 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
    video = {key: value for key, value in settings.items() if key != "image_processor_type"}
    video["video_processor_type"] = "Qwen2VLVideoProcessor"
    (target / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))


def _write_weights(source: Path, target: Path, layers: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    weights = load_file(source / "model.safetensors")
    weights.pop("lm_head.weight", None)
    for layer in range(layers):
        for kind in "qkv":
            name = f"model.layers.{layer}.self_attn.{kind}_proj"
            size = weights[f"{name}.weight"].shape[0]
            weights[f"{name}.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        if "visual" not in name:
            continue
        kept = value.contiguous().clone()
        if ".merger.mlp.2." in name:  # the last layer: blind
            kept.zero_()
        weights[name.replace("model.visual.", "visual.")] = kept
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
