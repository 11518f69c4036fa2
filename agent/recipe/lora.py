"""LoRA on the linear layers of a Llama-like model, read and written in peft's format.

`W' = W + scale * B A` with `W` frozen, `A` and `B` trained in float32 (Hu et al., 2021). The sum is
made once a step and rounded to the model's own type, so training sees exactly the weights that
merging the adapter gives (where a CPU trains in float32, merging alone rounds them); on small
models it is also much faster than adding `B (A x)` to every layer's output. The file is what peft
writes and reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer with a trained low-rank correction, starting at zero."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.merged(), self.base.bias)

    def merged(self) -> Tensor:
        """The layer's weight with the correction added, in the layer's type."""
        weight = self.base.weight
        return (weight + self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)


def add_lora(model: nn.Module, r: int, alpha: float) -> list[nn.Parameter]:
    """Freezes the model, puts LoRA on all its linear layers but the head, and returns the
    parameters to train.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in TARGETS:
                setattr(parent, name, LoraLinear(child, r, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights in bf16 under peft's names."""
    state = {}
    for name, module in _layers(model):
        for part in ("lora_A", "lora_B"):
            state[f"base_model.model.{name}.{part}.weight"] = (
                getattr(module, part).detach().to("cpu", torch.bfloat16).contiguous()
            )
    return state


def save_adapter(
    state: dict[str, Tensor], r: int, alpha: float, base_name: str, target: Path
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as peft does.

    `base_name` is a name, not a path.
    """
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    (target / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts saved weights back into a model that `add_lora` prepared."""
    with torch.no_grad():
        for name, module in _layers(model):
            for part in ("lora_A", "lora_B"):
                getattr(module, part).copy_(state[f"base_model.model.{name}.{part}.weight"])


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)
    )
