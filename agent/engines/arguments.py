"""From verl's rollout keys to SGLang's server arguments, and the environment its processes start
in.

`SGLangRollout` passes on only some of the keys and assumes a GPU; these are the rest. A value under
`engine_kwargs.sglang` always wins.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONTEXT_SLACK = 8
"""SGLang keeps some positions of the context for itself; with so many more all of `max_model_len`
is usable.
"""
CPU_KV_TOKENS = 65536
"""The most KV cache on a CPU, 1.5 GB for SmolLM2-135M; SGLang would take a share of all memory."""


def server_args(rollout: Mapping[str, Any], *, cuda: bool) -> dict[str, Any]:
    """The arguments to add to those of `SGLangRollout`. `rollout` has all of verl's keys."""
    batched = rollout["max_num_batched_tokens"]
    args = {
        "context_length": rollout["max_model_len"] + CONTEXT_SLACK,
        "dp_size": rollout["data_parallel_size"],
        "ep_size": rollout["expert_parallel_size"],
        "disable_cuda_graph": rollout["enforce_eager"],
        "disable_radix_cache": not rollout["enable_prefix_caching"],
        "chunked_prefill_size": batched if rollout["enable_chunked_prefill"] else -1,
        "max_prefill_tokens": batched,
        "enable_memory_saver": rollout["free_cache_engine"],
        "log_level": "error" if rollout["disable_log_stats"] else "info",
    }
    own = (rollout.get("engine_kwargs") or {}).get("sglang") or {}
    given = {key: value for key, value in own.items() if value is not None}
    return {**args, **({} if cuda else _cpu_args(rollout)), **given}


def _cpu_args(rollout: Mapping[str, Any]) -> dict[str, Any]:
    one = rollout["max_model_len"] + CONTEXT_SLACK
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "enable_memory_saver": False,
        "sleep_on_idle": True,
        "max_total_tokens": max(one, min(CPU_KV_TOKENS, one * rollout["max_num_seqs"])),
    }


def with_default_dtype(rollout: Mapping[str, Any], *, cuda: bool) -> dict[str, Any]:
    """The rollout keys with a `dtype`: the given one, or else the default."""
    return {**rollout, "dtype": rollout.get("dtype") or default_dtype(cuda=cuda)}


def default_dtype(*, cuda: bool) -> str:
    """bfloat16, or float32 on a CPU that is slow at bfloat16."""
    return "bfloat16" if cuda or cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU computes in bfloat16.

    Without such instructions float32 is up to twice as fast (8 concurrent requests, AVX2), with
    them it is many times slower.
    """
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return True
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def start_variables(*, cuda: bool) -> dict[str, str]:
    """Environment variables for the engine's processes; a value that the user has set stays."""
    wanted = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # SGLang keeps embeddings of images, and a weight sync does not empty that cache (PR 36468).
    wanted["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
    if not cuda:
        # torch.compile would spend half a minute on the first call. Threads that spin while they
        # wait for each other make a busy machine ten times slower.
        wanted |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return {key: value for key, value in wanted.items() if key not in os.environ}


def longer_context() -> dict[str, str]:
    """The variable that allows a context longer than the model's.

    Ours is longer by `CONTEXT_SLACK` only, which is never filled.
    """
    return {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables while an engine starts.

    Its processes inherit them; processes that the user starts later do not.
    """
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
