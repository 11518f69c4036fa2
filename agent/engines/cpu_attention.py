"""Faster decoding on a CPU: query heads that share keys go through attention as rows of one head.

SGLang's `torch_native` backend asks torch for grouped-query attention of one query a head. For
bfloat16 torch then takes three times as long as for the same numbers in the shape used here, and
decoding several conversations at once is mostly that.
"""

from __future__ import annotations

import importlib
from typing import Any

BACKEND = "torch_native"
_MODULE = "sglang.srt.layers.attention.torch_native_backend"


def use_grouped_attention() -> None:
    """Replaces the function that SGLang's backend calls. For the process of a scheduler."""
    from torch.nn.functional import scaled_dot_product_attention

    backend = importlib.import_module(_MODULE)
    if getattr(backend, "scaled_dot_product_attention", None) is scaled_dot_product_attention:
        backend.scaled_dot_product_attention = grouped_attention  # type: ignore[attr-defined]


def grouped_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, enable_gqa: bool = False, **kw: Any
) -> Any:
    """torch's `scaled_dot_product_attention`; `query` [B, heads, T, D], `key` [B, groups, S, D]."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, length, size = query.shape
    groups = key.shape[1]
    if length > 1 or not enable_gqa or attn_mask is not None or kw.get("is_causal"):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, enable_gqa=enable_gqa, **kw
        )
    rows = query.reshape(batch, groups, heads // groups, size)
    found = scaled_dot_product_attention(rows, key, value, **kw)
    return found.reshape(batch, heads, 1, value.shape[-1])
