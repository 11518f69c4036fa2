"""Every key of config.yaml by name, type and default: verl 0.6.1's `RolloutConfig` and ours.

A static table, because importing verl to ask it takes 8 s; a test compares the two. Where a default differs from
verl's dataclass, `OUR_DEFAULTS` says so and why. What a key means is verl's; comments are on what is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError


def _not_zero(top_k: int) -> int:
    if top_k == 0:
        raise PydanticCustomError(
            "top_k", "0 is verl's word for its HF rollout; write -1 to switch top_k off"
        )
    return top_k


Temperature = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(_not_zero)]
"""SGLang's scheduler keeps it in 32 bits, and ends where it does not fit."""
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """One mapping of the file. Unknown keys and wrong types are errors; `"0.7"` is not a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Sampling(Section):
    """`val_kwargs`: how to sample when validating."""

    temperature: Temperature = 0.0
    top_k: TopK = -1
    top_p: Share = 1.0
    do_sample: bool = False
    n: PositiveInt = 1


class MultiTurn(Section):
    """Turns and tools. Lengths are tokens; None is no limit, `rollout.max_model_len // 3` for the turns."""

    enable: bool = False
    max_assistant_turns: PositiveInt | None = None
    tool_config_path: str | None = None
    max_user_turns: Count | None = None
    max_parallel_calls: PositiveInt = 16
    max_tool_response_length: PositiveInt = 256
    tool_response_truncate_side: Literal["left", "middle", "right"] = "middle"
    interaction_config_path: str | None = None
    use_inference_chat_template: bool = False
    tokenization_sanity_check_mode: Literal["disable", "strict", "ignore_strippable"] = "strict"
    format: str = "hermes"
    num_repeat_rollouts: int | None = None


class CustomAsyncServer(Section):
    """verl's `agent.custom_async_server`."""

    path: str | None = None
    name: str | None = None


class AgentLoop(Section):
    """verl's `agent`: its AgentLoopManager, which does not run here."""

    num_workers: int = 8
    default_agent_loop: str = "single_turn_agent"
    agent_loop_config_path: str | None = None
    custom_async_server: CustomAsyncServer = CustomAsyncServer()


class Trace(Section):
    """verl's `trace`."""

    backend: str | None = None
    token2text: bool = False


class Server(Section):
    """The SGLang servers of `name: sglang_server`. Times are seconds. `urls` and `api_key` are ours.

    `max_attempts`: how often one turn is sent at most; `max_start_wait_time`: how long turns wait while no server is up or
    the queue is full.
    """

    timeout: PositiveFloat = 3600.0
    max_attempts: PositiveInt = 8
    retry_delay: Annotated[float, Field(ge=0.0)] = 2.0
    max_connections: PositiveInt = 1000
    max_start_wait_time: PositiveFloat = 300.0
    urls: list[str] = Field(default_factory=list)
    api_key: str | None = None
    """None: the environment's SGLANG_API_KEY, so that no secret need stand in a file. Never written to a run."""


class Prometheus(Section):
    """verl's `prometheus`."""

    enable: bool = False
    port: int = 9090
    file: str = "/tmp/ray/session_latest/metrics/prometheus/prometheus.yml"
    served_model_name: str | None = None


class Profiler(Section):
    """verl's `profiler`."""

    tool: str | None = None
    enable: bool = False
    all_ranks: bool = False
    ranks: list[int] = Field(default_factory=list)
    save_path: str | None = None
    tool_config: Any = None
    global_tool_config: Any = None


class EngineKwargs(Section):
    """Arguments handed to the engine by its own names: SGLang's `ServerArgs`."""

    sglang: dict[str, Any] = Field(default_factory=dict)
    vllm: dict[str, Any] = Field(default_factory=dict)


class Turntrace(Section):
    """What this runtime adds; taken out before verl sees the rest."""

    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Handed to the chat template at every render: `enable_thinking: false` and the like."""
    max_consecutive_invalid_calls: PositiveInt | None = 8
    """So many invalid tool calls in a row end a conversation with `invalid_tool_calls`; None: never."""
    conversation_deadline_s: PositiveFloat | None = None
    """Seconds that a conversation may run before it ends with `deadline`, those before `--resume` included; None: never."""
    max_tokens: PositiveInt | None = None
    """Tokens one turn may sample; None: whatever the other budgets leave."""
    recorded: str | None = None
    """With `name: scripted`: the run folder or trajectories.jsonl whose sampled tokens are played back."""


class Rollout(Section):
    """The `rollout:` block, in verl's order, then ours."""

    name: Literal["sglang", "sglang_server", "scripted"] = "sglang"
    mode: Literal["async", "sync"] = "async"
    temperature: Temperature = 1.0
    top_k: TopK = -1
    top_p: Share = 1.0
    do_sample: bool = True
    n: PositiveInt = 1
    over_sample_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    prompt_length: PositiveInt = 512
    response_length: PositiveInt = 512
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "bfloat16"
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    ignore_eos: bool = False
    enforce_eager: bool = False
    cudagraph_capture_sizes: list[int] | None = None
    free_cache_engine: bool = True
    data_parallel_size: PositiveInt = 1
    expert_parallel_size: PositiveInt = 1
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    max_num_batched_tokens: PositiveInt = 8192
    val_kwargs: Sampling = Sampling()
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt = 1024
    log_prob_micro_batch_size: int | None = None
    log_prob_micro_batch_size_per_gpu: int | None = None
    log_prob_use_dynamic_bsz: bool = False
    log_prob_max_token_len_per_gpu: int = 16384
    disable_log_stats: bool = True
    multi_stage_wake_up: bool = False
    engine_kwargs: EngineKwargs = EngineKwargs()
    calculate_log_probs: bool = False
    agent: AgentLoop = AgentLoop()
    trace: Trace = Trace()
    multi_turn: MultiTurn = MultiTurn()
    server: Server = Server()
    prometheus: Prometheus = Prometheus()
    update_weights_bucket_megabytes: int = 512
    skip_rollout: bool = False
    skip_dump_dir: str = "/tmp/rollout_dump"
    profiler: Profiler | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    load_format: str = "auto"
    layered_summon: bool = False
    layer_name_map: dict[str, Any] = Field(default_factory=dict)
    sglang_engine_mode: str = "local"
    limit_images: int | None = None
    skip_tokenizer_init: bool = True
    turntrace: Turntrace = Turntrace()


class ConfigFile(Section):
    """The whole of config.yaml."""

    model_path: str
    rollout: Rollout = Rollout()


OURS = ("turntrace", "server.urls", "server.api_key")
"""Keys under `rollout` that verl does not have."""

OUR_DEFAULTS = {
    "name": "verl has none",
    "mode": "the documented set-up is asynchronous",
    "skip_tokenizer_init": "token ids go in and out; rollout.yaml says so too",
    "tensor_model_parallel_size": "one device is what most machines have",
    "enforce_eager": "rollout.yaml's, because CUDA graphs are most of a small model's speed",
    "load_format": "outside a trainer nobody syncs weights into a dummy",
    "server.max_attempts": "each restart of a server costs the turns in flight one",
    "server.timeout": "a long turn on a busy server takes more than verl's 60 s, and a turn cut off is sampled in vain",
    "multi_turn.max_parallel_calls": "one call a turn is not what parallel means",
    "val_kwargs.temperature": "rollout.yaml's, greedy, which is what verl's trainers use",
    "val_kwargs.do_sample": "rollout.yaml's, greedy, which is what verl's trainers use",
}
"""Where a default is not that of verl's dataclass, and why."""


def known_paths(section: type[Section] = ConfigFile, prefix: str = "") -> dict[str, Any]:
    """All dotted paths of the table with their defaults, sections included, in order."""
    paths: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        paths[path] = (
            info.get_default(call_default_factory=True) if not info.is_required() else None
        )
        nested = Profiler if name == "profiler" else info.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            paths |= known_paths(nested, f"{path}.")
    return paths
