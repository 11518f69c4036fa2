"""EngineRollout: verl 0.6.1's SGLangRollout as the holder of an SGLang engine that turntrace's loop
drives.

Inherited: engine start-up, tensor parallelism, sampling params, weight sync (`update_weights`,
`release`, `resume`), single-turn batches, config checks. Replaced: the server arguments that assume
a GPU, the start of child processes (`processes.Children`), tool set-up (tools live outside of the
engine), and the process group of a process that drives the engine alone. What makes a trainer's
batches of it is `agent.trainers.rollout.AgentRollout`.

Only this class starts an engine in process. Importing it imports torch, sglang and verl, which
needs import guards on a CPU: call `agent.engines.start.start`, which prepares for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import os
import random
import socket
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sglang.srt.entrypoints.engine as sglang_engine
import sglang.srt.managers.tokenizer_manager as sglang_manager
import sglang.srt.utils.patch_torch as sglang_sharing
import torch
import torch.distributed as dist
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.hf_transformers_utils import get_context_length, get_hf_text_config
from torch.distributed.device_mesh import init_device_mesh
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.sglang_rollout import sglang_rollout
from verl.workers.rollout.sglang_rollout.utils import get_named_tensor_buckets

from agent.engines import compat, pictures
from agent.engines.arguments import environment, longer_context, server_args, with_default_dtype
from agent.engines.processes import Children
from agent.engines.sglang import SGLangEngine
from agent.errors import ConfigError, EngineError
from agent.model.base import model_name

MESH_DIMS = ("dp", "infer_tp", "pp")
PORTS = range(20000, 32000)
"""Ports for an engine, below those that the system hands out.

SGLang derives others from one, up to 10000 above it: all of them exist.
"""
ALONE_DEFAULTS = {
    "name": "sglang",
    "mode": "async",
    "skip_tokenizer_init": True,
    "tensor_model_parallel_size": 1,
    "load_format": "auto",
    "enforce_eager": False,
}
"""Used outside of a trainer: verl's own defaults are for one, which sends the weights."""
IDLE_S, IDLE_POLL_S = 60.0, 0.01
"""Time limit for an engine to end what was aborted (it needs one step of the model), and how often
it is asked.
"""


class EngineRollout(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    """verl's rollout worker whose engine turntrace's own loop drives, through `engine()`."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, log_path: Path | None = None
    ) -> None:
        """Takes verl's own three arguments, and where the engine's processes write.

        `log_path` None: they write to this process's output.
        """
        self.log_path = log_path
        super().__init__(config, model_config, device_mesh)

    @classmethod
    def alone(
        cls, rollout: Mapping[str, Any], model_path: Path, log_path: Path | None = None
    ) -> Self:
        """Makes one outside of verl's workers.

        `rollout` holds `RolloutConfig` keys, `model_path` is a local directory.
        """
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=MESH_DIMS)
        # Only the config is read here; the default attention needs a package that no engine needs.
        model = HFModelConfig(path=str(model_path), override_config={"attn_implementation": "sdpa"})
        return cls(rollout_config(rollout), model, mesh, log_path)

    # ------------------------------------------------------------------ start-up

    def _initialize_tools(
        self, config: Any, processing_class: Any
    ) -> tuple[list[Any], dict[str, Any], None, list[Any], None]:
        """No tools in the engine: turntrace parses and dispatches calls itself."""
        return [], {}, None, [], None

    def _initialize_interactions(self, config: Any) -> dict[str, Any]:
        """No interactions in the engine either."""
        return {}

    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        """A process alone drives all of the engine's GPUs.

        Several processes, one for each tensor-parallel rank, are verl's own case.
        """
        config = self.config
        if dist.get_world_size() > 1:
            _check_one_engine_a_group(config)
            super()._init_distributed_env(device_mesh_cpu, **kwargs)
            return
        self._device_mesh_cpu = init_device_mesh(
            "cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp")
        )
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = config.tensor_model_parallel_size
        self.train_tp = None
        wanted = self._tp_size * config.data_parallel_size
        self.visible_devices_set = set(_visible_devices(wanted))
        if wanted > len(self.visible_devices_set):
            raise ConfigError(
                "rollout.tensor_model_parallel_size * data_parallel_size: "
                f"{wanted} GPUs wanted, {len(self.visible_devices_set)} visible"
            )

    def _verify_config(self, model_hf_config: Any) -> None:
        """Adds to verl's checks that `max_model_len` fits the model: the engine does not check."""
        super()._verify_config(model_hf_config)
        longest = get_context_length(get_hf_text_config(model_hf_config))
        if self.config.max_model_len > longest:
            raise ConfigError(
                f"rollout.max_model_len: {self.config.max_model_len} is more than "
                f"the model's {longest} positions"
            )

    def _init_inference_engine(
        self, trust_remote_code: bool, actor_module: str, port: int | None
    ) -> None:
        self._children = Children(self.log_path)
        args = {**_ports(), **server_args(self.config, cuda=torch.cuda.is_available())}
        factory = functools.partial(_start_engine, self._children, args)
        get_socket = functools.partial(
            _open_socket, sglang_engine.get_zmq_socket, self._children.sockets
        )
        with (
            environment(longer_context()),
            replaced(sglang_rollout, AsyncEngine=factory, **compat.kernel_names(sglang_rollout)),
            replaced(
                sglang_engine,
                mp=self._children,
                configure_logger=_keep_logging,
                get_zmq_socket=get_socket,
                **compat.watchdogs(sglang_engine),
            ),
            replaced(
                sglang_manager,
                get_zmq_socket=get_socket,
                **pictures.replacements(Path(self.model_config.local_path)),
            ),
        ):
            super()._init_inference_engine(trust_remote_code, actor_module, port)
        if self.config.data_parallel_size > 1:
            self._children.watch_descendants()

    # ------------------------------------------------------------------ the engine

    def engine(self) -> SGLangEngine:
        """The engine for turntrace's loop: the same object on every call."""
        return self._turntrace_engine

    @functools.cached_property
    def _turntrace_engine(self) -> SGLangEngine:
        return SGLangEngine(
            self._engine.tokenizer_manager,
            self._children,
            self._describe(),
            data_parallel_size=self.config.data_parallel_size,
        )

    def _describe(self) -> dict[str, Any]:
        args = self._engine.server_args
        versions = {name: importlib.metadata.version(name) for name in ("sglang", "verl", "torch")}
        return {
            "name": "sglang",
            "model": model_name(Path(self.model_config.path)),
            "device": args.device,
            "dtype": args.dtype,
            **versions,
        }

    def shutdown(self) -> None:
        """Ends the engine's processes, from any thread.

        `engine().close()` also ends the requests that are in flight.
        """
        if self._engine is not None:
            self._engine.shutdown()

    # ------------------------------------------------------------------ weights and memory

    async def update_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], **kwargs: Any
    ) -> None:
        """Sends new weights to the engine and empties its prefix cache; waits for running requests.

        Tokens sampled afterwards have the number of this sync, from 1, as `weight_version`. A turn
        that begins during the sync may be sampled by both: weights go in buckets.
        """
        if self.config.data_parallel_size > 1:
            raise EngineError(
                "rollout.data_parallel_size: SGLang takes new weights for one rank only; "
                "use a rollout for each GPU"
            )
        async with self._weight_sync():
            await self._send(weights, **kwargs)

    @contextlib.asynccontextmanager
    async def _weight_sync(self) -> AsyncIterator[None]:
        if self._engine is None:  # on ranks beside the first
            yield
            return
        self._engine.weight_syncs += 1
        async with compat.weight_session(self._engine.tokenizer_manager, self._engine.answer):
            yield

    async def _send(self, weights: Iterator[tuple[str, torch.Tensor]], **kwargs: Any) -> None:
        is_one_for_all = self._tp_size > self.device_mesh["infer_tp"].size()
        send = self._update_all_ranks if is_one_for_all else super().update_weights
        if torch.cuda.is_available():
            await send(weights, **kwargs)
            return
        # SGLang's own way of sharing tensors between processes knows CUDA tensors only; torch's
        # own way serves here.
        with replaced(sglang_sharing, monkey_patch_torch_reductions=_keep_sharing):
            await send(weights, **kwargs)

    async def _update_all_ranks(
        self, weights: Iterator[tuple[str, torch.Tensor]], **_kwargs: Any
    ) -> None:
        """Sends from one process to the engine's several ranks; verl has a process for each rank.

        Each rank gets handles of its own: torch counts a shared tensor's receivers by its handles.
        """
        sglang_sharing.monkey_patch_torch_reductions()
        bucket_bytes = int(self.config.update_weights_bucket_megabytes) << 20
        for bucket in get_named_tensor_buckets(weights, bucket_bytes):
            named = [(name, tensor.detach()) for name, tensor in bucket]
            handles = [MultiprocessingSerializer.serialize(named) for _ in range(self._tp_size)]
            await self._engine.update_weights_from_tensor(
                UpdateWeightsFromTensorReqInput(serialized_named_tensors=handles)
            )
        await self._engine.flush_cache()

    async def release(self) -> None:
        """Frees weights and KV cache on the GPU.

        On a CPU it does nothing: there is nothing to free, and SGLang's scheduler would end.
        """
        if torch.cuda.is_available():
            await super().release()

    async def resume(self, tags: list[str]) -> None:
        """Takes back what `release` freed."""
        if torch.cuda.is_available():
            await super().resume(tags)


class _Engine(sglang_rollout.AsyncEngine):  # type: ignore[misc]
    """SGLang's engine, with two differences.

    It ends its own children only, not every child of the process. It fails if they end.
    """

    def __init__(self, children: Children, **kwargs: Any) -> None:
        self._children = children
        self.weight_syncs = 0
        super().__init__(**kwargs)
        manager = self.tokenizer_manager
        if manager is not None:  # None on the further nodes of an engine that spans several
            create = manager.auto_create_handle_loop
            manager.auto_create_handle_loop = functools.partial(_keep_signals, create)
            compat.before_new_weights(manager, functools.partial(until_idle, self))

    def shutdown(self) -> None:
        self._children.stop()

    async def flush_cache(self) -> Any:
        # The loop that reads answers is started by the first request. Without it this would wait
        # for ever.
        self.tokenizer_manager.auto_create_handle_loop()
        return await self.answer(super().flush_cache())

    async def update_weights_from_tensor(self, update_weights_request: Any) -> Any:
        update_weights_request.weight_version = str(self.weight_syncs)
        success, message = await self.answer(
            super().update_weights_from_tensor(update_weights_request)
        )
        if not success:  # verl does not look
            raise EngineError(f"SGLang did not take the weights: {message}")
        compat.set_weight_version(self.tokenizer_manager, str(self.weight_syncs))
        return success, message

    async def release_memory_occupation(self, tags: list[str] | None = None) -> Any:
        await until_idle(self)
        return await self.answer(super().release_memory_occupation(tags))

    async def resume_memory_occupation(self, tags: list[str] | None = None) -> Any:
        return await self.answer(super().resume_memory_occupation(tags))

    async def answer(self, request: Coroutine[Any, Any, Any]) -> Any:
        """Awaits one of the manager's coroutines.

        Raises EngineError if the engine ends meanwhile.
        """
        return await self._children.answer(asyncio.create_task(request))


async def until_idle(engine: Any) -> None:
    """Waits until the scheduler of `engine` has put away what it ran, and empties the prefix cache.

    Raises EngineError if it is busy for `IDLE_S`.
    """
    try:
        async with asyncio.timeout(IDLE_S):
            while not (await engine.flush_cache()).success:  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(IDLE_POLL_S)
    except TimeoutError as error:
        raise EngineError(f"SGLang is still busy after {IDLE_S:g} s") from error


def rollout_config(rollout: Mapping[str, Any]) -> RolloutConfig:
    """verl's dataclass, nested ones included, with the defaults of a process outside a trainer."""
    chosen = with_default_dtype(rollout, cuda=torch.cuda.is_available())
    return omega_conf_to_dataclass({**ALONE_DEFAULTS, **chosen}, RolloutConfig)


def _start_engine(children: Children, overrides: Mapping[str, Any], **kwargs: Any) -> _Engine:
    try:
        return _Engine(children, **{**kwargs, **overrides})
    except BaseException:
        children.stop()
        raise


def _open_socket(open_socket: Callable[..., Any], opened: list[Any], *args: Any) -> Any:
    """One of SGLang's sockets, which it never closes.

    Linger 0: a message that is unsent at the end must not keep this process waiting.
    """
    zmq_socket = open_socket(*args)
    zmq_socket.linger = 0
    opened.append(zmq_socket)
    return zmq_socket


def _keep_signals(create_handle_loop: Callable[[], None]) -> None:
    """Keeps SGLang from taking over SIGTERM and SIGQUIT, as it does if it runs on the main thread.

    It is made to believe that it runs on another one.
    """
    elsewhere = types.SimpleNamespace(current_thread=object, main_thread=object)
    with replaced(sglang_manager, threading=elsewhere):
        create_handle_loop()


def _keep_logging(*_args: object, **_kwargs: object) -> None:
    """SGLang would replace the handlers of the root logger, which are the user's."""


def _keep_sharing() -> None:
    """See `update_weights`."""


def _check_one_engine_a_group(config: Any) -> None:
    """A trainer has a rollout for each group of tensor-parallel ranks: its data parallelism.

    Raises ConfigError.
    """
    if config.data_parallel_size > 1:
        raise ConfigError(
            "rollout.data_parallel_size: must be 1 in a trainer with several ranks, which has an "
            "engine for each tensor_model_parallel_size of them"
        )


def _ports() -> dict[str, Any]:
    """Free ports for an engine alone; verl's fixed ones would let a machine have only one.

    A trainer keeps verl's.
    """
    if dist.get_world_size() > 1 or "SGLANG_PORT" in os.environ:
        return {}
    return {"port": free_port(PORTS), "nccl_port": None}  # None: SGLang looks for a free one


def free_port(ports: Sequence[int]) -> int:
    """One of the ports that nothing listens on. Raises ConfigError if there is none."""
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(
        f"no port from {ports[0]} to {ports[-1]} is free; set SGLANG_PORT to one that is"
    )


def _visible_devices(count: int) -> list[str]:
    if not torch.cuda.is_available():
        return [str(index) for index in range(count)]
    if listed := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return listed.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of a module for as long as the block runs."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
