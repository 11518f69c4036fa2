"""Hands back SGLang's own classes, which it has defined by the time it imports these names."""

from sglang.srt.layers.layernorm import GemmaRMSNorm as GemmaRMSNorm
from sglang.srt.layers.layernorm import RMSNorm as RMSNorm
