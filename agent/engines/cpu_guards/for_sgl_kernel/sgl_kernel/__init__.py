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
            f"sgl_kernel.{name} was called, but sgl-kernel is not installed: it has no build for this CPU"
        )

    return kernel
