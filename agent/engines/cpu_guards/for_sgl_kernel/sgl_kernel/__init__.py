"""Stands in for `sgl_kernel`: any name can be imported, none can be called.

There must be no module `sgl_kernel.scalar_type`: SGLang then uses its own.
"""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*_args: object, **_kwargs: object) -> Any:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but sgl-kernel is not installed: it has no build for "
            "this CPU"
        )

    return kernel


def _declare_operators() -> Any:
    """Declares the operators that SGLang 0.5.23 looks up at import; none is ever run."""
    import torch

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in (
        "fused_dual_residual_rmsnorm_cpu",
        "fused_gdn_gating_cpu",
        "fused_moe_router_cpu",
        "fused_qk_gemma_rmsnorm_cpu",
        "fused_qk_gemma_rmsnorm_with_gate_cpu",
        "fused_qkvzba_split_reshape_cat_contiguous_cpu",
        "fused_sigmoid_mul_cpu",
        "rmsnorm_cpu",
    ):
        library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    return library


_library = _declare_operators()
