"""Hands back SGLang's own classes, which it has defined by the time it imports these names."""

from sglang.srt.layers.activation import GeluAndMul as GeluAndMul
from sglang.srt.layers.activation import SiluAndMul as SiluAndMul
