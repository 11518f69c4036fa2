"""AgentRollout: verl 0.6.1's SGLangRollout with what turntrace needs of it, and nothing else changed.

Inherited: engine start-up, tensor parallelism, sampling params, weight sync (`update_weights`, `release`, `resume`),
single-turn batches, config checks. Replaced: the server arguments that assume a GPU, the start of child processes
(`processes.Children`), tool set-up (ours lives outside the engine), multi_turn batches (`agent.trainers.batches`), and the process
group of a process that drives the engine alone.

This is the only file that imports verl's rollout and starts an engine. Importing it imports torch, sglang and verl,
which on a CPU needs the import guards: call `agent.engines.sglang.start`, which prepares for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import os
import socket
import types
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import sglang.srt.entrypoints.engine as sglang_engine
import sglang.srt.managers.tokenizer_manager as sglang_manager
import sglang.srt.utils.patch_torch as sglang_sharing
import torch
import torch.distributed as dist
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.hf_transformers_utils import get_context_length, get_hf_text_config
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from transformers import ProcessorMixin
from verl import DataProto
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.schemas import Message
from verl.workers.rollout.sglang_rollout import sglang_rollout
from verl.workers.rollout.sglang_rollout.utils import get_named_tensor_buckets

from agent.engines.arguments import environment, longer_context, server_args
from agent.engines.processes import Children
from agent.engines.sglang import SGLangEngine
from agent.errors import AgentError, ConfigError, EngineError
from agent.loop.boundary import describe
from agent.model.base import model_name
from agent.trainers.batches import TrainerBatches
from agent.trainers.layout import Shape, batch_arrays, batch_columns

_Made = tuple[dict[str, Any], dict[str, Any]]
"""A batch's arrays and columns."""

IDLE_S = 60.0
"""How long an engine may take to end what was aborted: a step of the model, in fact."""

MESH_DIMS = ("dp", "infer_tp", "pp")
ALONE_DEFAULTS = {
    "name": "sglang",
    "mode": "async",
    "skip_tokenizer_init": True,
    "tensor_model_parallel_size": 1,
    "load_format": "auto",
    "enforce_eager": False,
}
"""Where verl's own defaults are meant for a trainer, which sends the weights."""


class AgentRollout(sglang_rollout.SGLangRollout):  # type: ignore[misc]
    """verl's rollout worker whose engine turntrace's own loop drives, through `engine()`."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, log_path: Path | None = None
    ) -> None:
        """verl's own three arguments, and where the engine's processes write (None: this process's output)."""
        self.log_path = log_path
        super().__init__(config, model_config, device_mesh)

    @classmethod
    def alone(
        cls, rollout: Mapping[str, Any], model_path: Path, log_path: Path | None = None
    ) -> AgentRollout:
        """One outside of verl's workers: `rollout` holds `RolloutConfig` keys, `model_path` is a local directory."""
        config = _rollout_config(rollout)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=MESH_DIMS)
        # Only the config is read here; the default asks for a package that no engine needs.
        model = HFModelConfig(path=str(model_path), override_config={"attn_implementation": "sdpa"})
        return cls(config, model, mesh, log_path)

    def _initialize_tools(
        self, config: Any, processing_class: Any
    ) -> tuple[list[Any], dict[str, Any], None, list[Any], None]:
        """No tools in the engine: turntrace parses and dispatches calls itself."""
        return [], {}, None, [], None

    def _initialize_interactions(self, config: Any) -> dict[str, Any]:
        """No interactions in the engine either."""
        return {}

    def _req_level_generate_sequences(self, prompts: Any, **kwargs: Any) -> Any:
        """A trainer's multi_turn batch through turntrace's loop: the first tensor-parallel rank runs it, all return the same.

        What goes wrong there is raised on all of them: none waits for one that is gone.
        """
        made: _Made | None = None
        failure: Exception | None = None
        if self._tp_rank == 0:
            try:
                made = self._run_batch(prompts, kwargs)
            except Exception as error:
                failure = error
        dist.barrier()
        made, told = self._from_first_rank((made, describe(failure) if failure else None))
        if failure:
            raise failure
        if made is None:
            raise AgentError(f"the first tensor-parallel rank failed: {told}")
        return _batch(*made, prompts.batch["input_ids"].device)

    def _run_batch(self, prompts: Any, overrides: Mapping[str, Any]) -> _Made:
        loop = asyncio.get_event_loop()
        trajectories = loop.run_until_complete(self._trainer.run(prompts, overrides))
        loop.run_until_complete(self._empty_cache())
        shape = Shape(
            self.config.prompt_length,
            self.config.response_length,
            self.pad_token_id,
            self.config.calculate_log_probs,
        )
        return batch_arrays(trajectories, shape), batch_columns(trajectories)

    async def _empty_cache(self) -> None:
        """As verl does: the KV cache is not needed again. Waits for what was aborted to end in the engine.

        Busy, SGLang empties nothing, and its scheduler ends when it is told to release its memory.
        """
        try:
            async with asyncio.timeout(IDLE_S):
                while not (await self._engine.flush_cache()).success:  # noqa: ASYNC110 - it is another process that changes
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise EngineError(
                f"SGLang is still busy {IDLE_S:g} s after the last conversation ended"
            ) from error

    def _from_first_rank(
        self, outcome: tuple[_Made | None, str | None]
    ) -> tuple[_Made | None, str | None]:
        group = self._device_mesh_cpu["tp"]
        if group.size() == 1:
            return outcome
        first = group.mesh[0].item()
        received = sglang_rollout.broadcast_pyobj(
            [outcome], rank=self._rank, dist_group=group.get_group(), src=first
        )
        return received[0]  # type: ignore[no-any-return]

    @functools.cached_property
    def _trainer(self) -> TrainerBatches:
        if isinstance(self.processing_class, ProcessorMixin):
            raise ConfigError(
                f"{self.model_config.path} has a processor for images or sound; turntrace's multi_turn batches are text only"
            )
        return TrainerBatches(
            self.engine(),
            self.processing_class,
            self.config,
            self.sampling_params,
            str(self.model_config.path),
        )

    def _init_distributed_env(self, device_mesh_cpu: Any, **kwargs: Any) -> None:
        """A process alone drives all of the engine's GPUs; several are verl's own case, one per tensor-parallel rank."""
        if dist.get_world_size() > 1:
            super()._init_distributed_env(device_mesh_cpu, **kwargs)
            return
        self._device_mesh_cpu = init_device_mesh(
            "cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "pp")
        )
        self._rank = self._tp_rank = 0
        self._tp_size = self.tensor_parallel_size = self.config.tensor_model_parallel_size
        self.train_tp = None
        self.visible_devices_set = set(_visible_devices(self._tp_size))
        if self._tp_size > len(self.visible_devices_set):
            raise ConfigError(
                f"rollout.tensor_model_parallel_size: {self._tp_size} GPUs wanted, {len(self.visible_devices_set)} visible"
            )

    def _verify_config(self, model_hf_config: Any) -> None:
        """verl's checks, and that `max_model_len` itself fits the model: the engine is not asked to check it."""
        super()._verify_config(model_hf_config)
        longest = get_context_length(get_hf_text_config(model_hf_config))
        if self.config.max_model_len > longest:
            raise ConfigError(
                f"rollout.max_model_len: {self.config.max_model_len} is more than the model's {longest} positions"
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
            _replaced(sglang_rollout, AsyncEngine=factory),
            _replaced(
                sglang_engine,
                mp=self._children,
                configure_logger=_keep_logging,
                get_zmq_socket=get_socket,
            ),
            _replaced(sglang_manager, get_zmq_socket=get_socket),
        ):
            super()._init_inference_engine(trust_remote_code, actor_module, port)

    def engine(self) -> SGLangEngine:
        """The engine for turntrace's loop: the same object on every call."""
        return self._turntrace_engine

    async def update_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], **kwargs: Any
    ) -> None:
        """Sends new weights to the engine and empties its prefix cache; waits for requests that run.

        What is sampled from then on has the number of this sync, from 1, as `weight_version`. A turn that begins
        meanwhile may be sampled by both: weights go in buckets.
        """
        if self._engine is not None:  # None on ranks beside the first
            self._engine.weight_syncs += 1
        is_one_for_all = self._tp_size > self.device_mesh["infer_tp"].size()
        send = self._update_all_ranks if is_one_for_all else super().update_weights
        if torch.cuda.is_available():
            await send(weights, **kwargs)
            return
        # SGLang's own way of sharing tensors between processes knows CUDA tensors only; torch's serves here.
        with _replaced(sglang_sharing, monkey_patch_torch_reductions=_keep_sharing):
            await send(weights, **kwargs)

    async def _update_all_ranks(
        self, weights: Iterator[tuple[str, torch.Tensor]], **_kwargs: Any
    ) -> None:
        """From one process to the engine's several ranks; verl's own way has one process per rank to send from.

        Each rank gets handles of its own: torch counts a shared tensor's receivers by its handles.
        """
        sglang_sharing.monkey_patch_torch_reductions()
        for bucket in get_named_tensor_buckets(
            weights, int(self.config.update_weights_bucket_megabytes) << 20
        ):
            named = [(name, tensor.detach()) for name, tensor in bucket]
            handles = [MultiprocessingSerializer.serialize(named) for _ in range(self._tp_size)]
            await self._engine.update_weights_from_tensor(
                UpdateWeightsFromTensorReqInput(serialized_named_tensors=handles)
            )
        await self._engine.flush_cache()

    async def release(self) -> None:
        """Frees weights and KV cache on the GPU; without one there is nothing to free, and SGLang would end trying."""
        if torch.cuda.is_available():
            await super().release()

    async def resume(self, tags: list[str]) -> None:
        """Takes back what `release` freed."""
        if torch.cuda.is_available():
            await super().resume(tags)

    def shutdown(self) -> None:
        """Ends the engine's processes, from any thread; `engine().close()` also ends what is in flight."""
        if self._engine is not None:
            self._engine.shutdown()

    @functools.cached_property
    def _turntrace_engine(self) -> SGLangEngine:
        return SGLangEngine(self._engine.tokenizer_manager, self._children, self._describe())

    def _describe(self) -> dict[str, Any]:
        args = self._engine.server_args
        versions = {name: importlib.metadata.version(name) for name in ("sglang", "verl", "torch")}
        model = model_name(Path(self.model_config.path))
        return {
            "name": "sglang",
            "model": model,
            "device": args.device,
            "dtype": args.dtype,
            **versions,
        }


# A trainer's workers import the module that `actor_rollout_ref.model.external_lib` names before they look up their rollout
# class: with `agent.rollout` there, theirs is ours.
_ROLLOUT_REGISTRY["sglang", "sync"] = f"{__name__}.{AgentRollout.__name__}"


def refuse_async(**_arguments: Any) -> None:
    """In the place of verl's class for `mode: async`. Raises ConfigError: that mode would run verl's own loop without a word."""
    raise ConfigError(
        "actor_rollout_ref.rollout.mode: with external_lib agent.rollout only sync works; async runs verl's own agent loop"
    )


_ROLLOUT_REGISTRY["sglang", "async"] = f"{__name__}.{refuse_async.__name__}"


class _Engine(sglang_rollout.AsyncEngine):  # type: ignore[misc]
    """SGLang's engine that ends its own children only, not every child of the process, and that fails when they end."""

    def __init__(self, children: Children, **kwargs: Any) -> None:
        self._children = children
        self.weight_syncs = 0
        super().__init__(**kwargs)
        if (
            self.tokenizer_manager is not None
        ):  # None on the further nodes of an engine that spans several
            create = self.tokenizer_manager.auto_create_handle_loop
            self.tokenizer_manager.auto_create_handle_loop = functools.partial(
                _keep_signals, create
            )

    def shutdown(self) -> None:
        self._children.stop()

    async def flush_cache(self) -> Any:
        # Without the loop that reads answers, which only a first request starts, this would wait for ever.
        self.tokenizer_manager.auto_create_handle_loop()
        return await self._answer(super().flush_cache())

    async def update_weights_from_tensor(self, update_weights_request: Any) -> Any:
        success, message = await self._answer(
            super().update_weights_from_tensor(update_weights_request)
        )
        if not success:  # verl would not look
            raise EngineError(f"SGLang did not take the weights: {message}")
        self.tokenizer_manager.server_args.weight_version = str(
            self.weight_syncs
        )  # SGLang's answers tell it
        return success, message

    async def release_memory_occupation(self, tags: list[str] | None = None) -> Any:
        return await self._answer(super().release_memory_occupation(tags))

    async def resume_memory_occupation(self, tags: list[str] | None = None) -> Any:
        return await self._answer(super().resume_memory_occupation(tags))

    async def _answer(self, request: Coroutine[Any, Any, Any]) -> Any:
        return await self._children.answer(asyncio.create_task(request))


def _batch(arrays: Mapping[str, Any], columns: dict[str, Any], device: torch.device) -> DataProto:
    """The batch that verl's trainer expects back, its messages in verl's own class."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    for index, messages in enumerate(columns["messages"]):
        columns["messages"][index] = {
            "messages": [
                Message(role=said["role"], content=said["content"] or "") for said in messages
            ]
        }
    return DataProto(
        batch=TensorDict(tensors, batch_size=len(columns["messages"])), non_tensor_batch=columns
    )


def _rollout_config(rollout: Mapping[str, Any]) -> RolloutConfig:
    """verl's dataclass, nested ones included, with the defaults of a process outside a trainer."""
    return omega_conf_to_dataclass({**ALONE_DEFAULTS, **rollout}, RolloutConfig)


def _start_engine(children: Children, overrides: Mapping[str, Any], **kwargs: Any) -> _Engine:
    try:
        return _Engine(children, **{**kwargs, **overrides})
    except BaseException:
        children.stop()
        raise


def _open_socket(open_socket: Callable[..., Any], opened: list[Any], *args: Any) -> Any:
    """One of SGLang's sockets, which it never closes: what is unsent at the end must not keep this process waiting."""
    zmq_socket = open_socket(*args)
    zmq_socket.linger = 0
    opened.append(zmq_socket)
    return zmq_socket


def _keep_signals(create_handle_loop: Callable[[], None]) -> None:
    """SGLang would take over SIGTERM and SIGQUIT when it runs on the main thread: it is told that it does not."""
    elsewhere = types.SimpleNamespace(current_thread=object, main_thread=object)
    with _replaced(sglang_manager, threading=elsewhere):
        create_handle_loop()


def _keep_logging(*_args: object, **_kwargs: object) -> None:
    """SGLang would replace the handlers of the root logger, which are the user's."""


def _keep_sharing() -> None:
    """See `update_weights`."""


def _ports() -> dict[str, Any]:
    """Free ports for an engine alone; verl's fixed ones would let a machine have only one. A trainer keeps verl's."""
    if dist.get_world_size() > 1 or "SGLANG_PORT" in os.environ:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {
            "port": probe.getsockname()[1],
            "nccl_port": None,
        }  # None: SGLang looks for a free one


def _visible_devices(count: int) -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        return (
            listed.split(",")
            if listed
            else [str(index) for index in range(torch.cuda.device_count())]
        )
    return [str(index) for index in range(count)]


@contextlib.contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
