"""`rotary_embedding` is looked up when a layer is built; on a CPU SGLang then calls its own
pure-torch code.
"""

from typing import Any


def rotary_embedding(*_args: object, **_kwargs: object) -> Any:
    raise NotImplementedError(
        "vllm._custom_ops.rotary_embedding was called, but vLLM is not installed"
    )
