"""verl 0.9's trainer on a machine without a GPU: a platform `cpu` for its workers.

verl imports the module that VERL_USE_EXTERNAL_MODULES names in each of its processes. Its FSDP
engine runs on gloo; SGLang is told to use a CPU by its own arguments. A Ray resource named GPU
stands for the one place that workers take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_MODULE = SimpleNamespace(
    is_available=lambda: False,
    empty_cache=_nothing,
    synchronize=_nothing,
    set_device=_nothing,
    manual_seed=torch.manual_seed,
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    max_memory_allocated=lambda *_: 0,
    max_memory_reserved=lambda *_: 0,
    reset_peak_memory_stats=_nothing,
    mem_get_info=lambda *_: (1, 1),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    get_device_name=lambda *_: "cpu",
)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """The host's own cores as the one device."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = _nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    def get_collective_module(self) -> Any:
        return None

    def cudart(self) -> Any:
        return None


def _install() -> None:
    set_platform(CpuPlatform())  # before the imports below, which ask for the device's name
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.rollout import base

    EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
        FSDPEngineWithLMHead
    )
    base._ROLLOUT_REGISTRY["sglang", "async"] = "tests.agent.verl09.cpu_adapter.CpuServerAdapter"
    torch.distributed.init_process_group = _with_one_backend(torch.distributed.init_process_group)


def _with_one_backend(start: Any) -> Any:
    """verl asks for one backend for the CPU and one for the device: here they are the same."""

    def started(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return start("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    return started


_install()
