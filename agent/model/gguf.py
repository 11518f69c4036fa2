"""Reads SmolLM2's GGUF file into what a Hugging Face model directory holds: weights, config,
tokenizer.

transformers can read the file too, but takes half a minute and gets this tokenizer wrong: another
end token, no padding token, a BOS in front, no splitting of digits. Here every value comes from the
file's own fields.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""`token_type` of a special token in GGUF."""


def write_model(gguf_file: Path, chat_template: str, target: Path) -> None:
    """Writes `target` as a plain HF directory: bf16 safetensors, config, generation config,
    tokenizer, template.
    """
    reader, field = _open(gguf_file)
    target.mkdir(parents=True)
    _write_weights(
        reader.tensors,
        field["llama.attention.head_count"](),
        field["llama.attention.head_count_kv"](),
        target,
    )
    _write_json(target / "config.json", _config(field))
    _write_json(target / "generation_config.json", _special_ids(field))
    _write_tokenizer(field, chat_template, target)


def write_tokenizer(gguf_file: Path, chat_template: str, target: Path) -> None:
    """Writes the tokenizer and the template alone: the same files as `write_model`'s."""
    target.mkdir(parents=True)
    _write_tokenizer(_open(gguf_file)[1], chat_template, target)


def _open(gguf_file: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    # Token lists have one part per token; only the fields that are read here are worth decoding.
    return reader, {key: item.contents for key, item in reader.fields.items()}


def _write_weights(tensors: Any, heads: int, kv_heads: int, target: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    weights = {}
    for tensor in tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name:
            values = _unpermute(values, heads)
        elif ".attn_k." in tensor.name:
            values = _unpermute(values, kv_heads)
        weights[hf_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
    """
    if name in _OUTER:
        return _OUTER[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_INNER[part]}.{kind}"


def _unpermute(values: Any, heads: int) -> Any:
    """GGUF interleaves each head's two rotary halves (llama.cpp's convert script); this puts them
    back.
    """
    rows, columns = values.shape
    return (
        values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _config(field: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "hidden_size": field["llama.embedding_length"](),
        "intermediate_size": field["llama.feed_forward_length"](),
        "num_hidden_layers": field["llama.block_count"](),
        "num_attention_heads": field["llama.attention.head_count"](),
        "num_key_value_heads": field["llama.attention.head_count_kv"](),
        "max_position_embeddings": field["llama.context_length"](),
        "rms_norm_eps": 1e-5,
        "rope_theta": field["llama.rope.freq_base"](),
        "vocab_size": field["llama.vocab_size"](),
        **_special_ids(field),
    }


def _special_ids(field: Any) -> dict[str, int]:
    return {
        "bos_token_id": field["tokenizer.ggml.bos_token_id"](),
        "eos_token_id": field["tokenizer.ggml.eos_token_id"](),
        "pad_token_id": field["tokenizer.ggml.padding_token_id"](),
    }


def _write_tokenizer(field: Any, chat_template: str, target: Path) -> None:
    _write_tokens(field, target)
    _write_json(target / "tokenizer_config.json", _tokenizer_config(field))
    (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_tokens(field: Any, target: Path) -> None:
    from tokenizers import (  # type: ignore[import-untyped]
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens: list[str] = field["tokenizer.ggml.tokens"]()
    types: list[int] = field["tokenizer.ggml.token_type"]()
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]()]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    # `tokenizer.ggml.pre` is "smollm": single digits, then GPT-2's byte level split.
    split = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(target / "tokenizer.json"))


def _tokenizer_config(field: Any) -> dict[str, Any]:
    tokens: list[str] = field["tokenizer.ggml.tokens"]()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]()],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]()],
        "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]()],
        "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]()],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": field["llama.context_length"](),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
