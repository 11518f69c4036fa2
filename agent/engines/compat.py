"""What differs between SGLang's versions, and what verl 0.6.1 misses in newer packages.

`DIFFERENCES` is the table. Each one is found by what is there, not by the version's number, so that
an unknown version is tried. `check` names what an unknown version lacks, in one line, before
anything of it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from agent.errors import EngineError, EngineStartError

PROVEN = ("0.5.5", "0.5.12", "0.5.23")
"""The versions of SGLang whose engines run in the tests."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`what` is so from version `since` on; `done` is what is done about it, and where."""

    what: str
    since: str
    done: str


DIFFERENCES = (
    Difference(
        "the engine polls the pipe to its scheduler before it reads",
        "0.5.12",
        "processes: the watched end has `poll`",
    ),
    Difference(
        "a watchdog sends SIGQUIT to this process when a child ends or was never started",
        "0.5.12",
        "`watchdogs`: the class is replaced while an engine starts; `Children` watches them",
    ),
    Difference(
        "SGLANG_GRPC_PORT is the port + 10000, which must be a port",
        "0.5.12 to 0.5.15",
        "rollout: ports are drawn where all derived ones exist",
    ),
    Difference(
        "the processes of data parallelism are started with keyword arguments",
        "0.5.12",
        "processes: `Children.Process` takes them",
    ),
    Difference(
        "the time in the queue is reported only with enable_metrics",
        "0.5.9",
        "nothing: `queue_s` is None unless engine_kwargs.sglang says enable_metrics: true",
    ),
    Difference(
        "the manager takes the weights' version from the request for them",
        "0.5.12",
        "rollout names it there; `set_weight_version` sets it for those before",
    ),
    Difference(
        "weights are taken only between begin_weight_update and end_weight_update",
        "0.5.23",
        "`weight_session` brackets a sync if the engine has them",
    ),
    Difference(
        "the scheduler dies of new weights, or of a release, while it puts away a request whose "
        "answer has left; from 0.5.23 on it refuses the weights",
        "0.5.5",
        "`before_new_weights`, and `_Engine` before a release, wait until it is idle",
    ),
    Difference(
        "an exact fit that ends with the end token is reported as stop; before, as length",
        "0.5.23",
        "nothing: the loop looks at the last token",
    ),
    Difference(
        "ids beside images stay exact; 0.5.5 decodes and encodes them again",
        "0.5.14",
        "pictures: the image processor of 0.5.5 and 0.5.12 is replaced, others are refused images",
    ),
    Difference(
        "get_open_port and get_local_ip_auto left sglang.srt.utils, where verl 0.6.1 looks",
        "0.5.12",
        "`add_moved_names` puts them back",
    ),
    Difference(
        "transformers 5 has no AutoModelForVision2Seq, which verl 0.6.1 imports",
        "0.5.12",
        "`add_moved_names` puts its successor there; a verl 0.6.1 trainer imports verl first "
        "and cannot start, see `agent.rollout`",
    ),
    Difference(
        "the kernels' distribution is sglang-kernel; verl 0.6.1 asks for sgl-kernel",
        "0.5.12",
        "`kernel_names` accepts either",
    ),
    Difference(
        "operators of sgl_kernel are looked up when SGLang is imported, and torchvision is needed",
        "0.5.23",
        "cpu_guards declares the operators; agent/setup lists torchvision",
    ),
)

NEEDED = {
    "sglang.srt.entrypoints.engine": ("Engine", "mp", "configure_logger", "get_zmq_socket"),
    "sglang.srt.managers.io_struct": (
        "GenerateReqInput",
        "ReleaseMemoryOccupationReqInput",
        "ResumeMemoryOccupationReqInput",
        "UpdateWeightsFromTensorReqInput",
    ),
    "sglang.srt.managers.tokenizer_manager": ("TokenizerManager", "get_zmq_socket", "threading"),
    "sglang.srt.managers.tokenizer_manager:TokenizerManager": (
        "abort_request",
        "auto_create_handle_loop",
        "flush_cache",
        "generate_request",
        "release_memory_occupation",
        "resume_memory_occupation",
        "update_weights_from_tensor",
    ),
    "sglang.srt.utils": ("MultiprocessingSerializer", "get_open_port"),
    "sglang.srt.utils.hf_transformers_utils": ("get_context_length", "get_hf_text_config"),
    "sglang.srt.utils.patch_torch": ("monkey_patch_torch_reductions",),
    "sglang.srt.weight_sync.utils": ("update_weights",),
}
"""What verl's rollout and `agent.engines` use of SGLang, by module or module:class."""


def prepare_sglang() -> None:
    """Makes verl 0.6.1's rollout importable. Call it before anything of verl is imported.

    Raises EngineStartError if the installed SGLang lacks something that is needed, or if verl is of
    another version.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        check_verl(importlib.metadata.version("verl"))
    add_moved_names()
    check_names()


def check_verl(found: str) -> None:
    """Raises EngineStartError, one line, if that version of verl has no rollout class to hold an
    engine in process.
    """
    if not found.startswith("0.6."):
        raise EngineStartError(
            f"an engine in process needs verl 0.6.1's rollout class, which verl {found} does not "
            "have: use an environment without that verl, or rollout.name: sglang_server"
        )


def add_moved_names() -> None:
    """Puts back the names that verl 0.6.1 imports from where they no longer are."""
    for name in ("get_open_port", "get_local_ip_auto"):
        if lacks("sglang.srt.utils", name):
            with contextlib.suppress(ImportError, AttributeError):
                utils = importlib.import_module("sglang.srt.utils")
                network = importlib.import_module("sglang.srt.utils.network")
                setattr(utils, name, getattr(network, name))
    import transformers  # after SGLang, which may put another module in its place

    if not hasattr(transformers, "AutoModelForVision2Seq"):
        transformers.AutoModelForVision2Seq = transformers.AutoModelForImageTextToText


def check_names() -> None:
    """Raises EngineStartError, one line, if the installed SGLang lacks something of `NEEDED`."""
    lacking = [
        f"{place}.{name}" for place, names in NEEDED.items() for name in names if lacks(place, name)
    ]
    if lacking:
        raise EngineStartError(
            f"SGLang {importlib.metadata.version('sglang')} lacks {', '.join(lacking)}; "
            f"turntrace is proven with SGLang {', '.join(PROVEN)}: install one of these"
        )


def lacks(place: str, name: str) -> bool:
    """Whether a module, or a class written `module:Class`, has no attribute of that name.

    Raises ImportError if the module is there, and what it imports of other packages is not.
    """
    module, _, owner = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        return True
    return not hasattr(getattr(found, owner, None) if owner else found, name)


class NoWatchdog:
    """Stands in for SGLang's watchdogs of child processes."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


def watchdogs(engine_module: Any) -> dict[str, Any]:
    """The module's watchdog classes by name, each with its stand-in."""
    return dict.fromkeys(
        (name for name in vars(engine_module) if name.endswith("Watchdog")), NoWatchdog
    )


def set_weight_version(manager: Any, version: str) -> None:
    """Makes `version` the `weight_version` of answers, if the manager does not do so itself."""
    if not hasattr(manager, "_update_weight_version_if_provided"):
        manager.server_args.weight_version = version


def before_new_weights(manager: Any, idle: Callable[[], Awaitable[None]]) -> None:
    """Makes the manager await `idle` where no request runs and none can begin before new weights.

    Raises EngineStartError if that place is not there.
    """
    name = "update_weights_from_tensor_communicator"
    send = getattr(manager, name, None)
    if send is None:
        raise EngineStartError(f"SGLang {importlib.metadata.version('sglang')} lacks {name}")

    async def send_when_idle(request: Any) -> Any:
        await idle()
        return await send(request)

    setattr(manager, name, send_when_idle)


def kernel_names(rollout_module: Any) -> dict[str, Any]:
    """The function that checks for the distribution `sgl-kernel`, accepting its new name."""
    given = rollout_module.assert_pkg_version

    def accept(name: str, *version_and_advice: str) -> None:
        if name != "sgl-kernel" or not _is_installed("sglang-kernel"):
            given(name, *version_and_advice)

    return {"assert_pkg_version": accept}


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextlib.asynccontextmanager
async def weight_session(
    manager: Any, answer: Callable[[Any], Awaitable[Any]]
) -> AsyncIterator[None]:
    """Brackets requests for new weights. `answer` awaits one of the manager's coroutines.

    Raises EngineError if SGLang refuses.
    """
    if not hasattr(manager, "begin_weight_update"):
        yield
        return
    requests = importlib.import_module("sglang.srt.managers.io_struct")
    await _granted(answer(manager.begin_weight_update(requests.BeginWeightUpdateReqInput(), None)))
    try:
        yield
    finally:
        await _granted(answer(manager.end_weight_update(requests.EndWeightUpdateReqInput(), None)))


async def _granted(answer: Awaitable[Any]) -> None:
    success, message = await answer
    if not success:
        raise EngineError(f"SGLang did not take the weights: {message}")
