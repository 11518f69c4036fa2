"""Every key of config.yaml: its name, type, default and fate.

The keys are those of verl 0.6.1's `RolloutConfig`, and ours. The table is static, because importing
verl takes 8 s; a test compares the two. `OUR_DEFAULTS` says which defaults are not those of verl's
dataclass, and why. verl documents what its keys mean; the comments here are about ours.

A key without a fate works with every engine. See `fates.py` for the others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from agent.config.fates import (
    PROGRAMS,
    Inside,
    NoEffect,
    Refused,
    Switch,
    Warned,
    When,
    fates_of,
)
from agent.config.installed import sglang_arguments


def _not_zero(top_k: int) -> int:
    if top_k == 0:
        raise PydanticCustomError(
            "top_k", "verl's HF rollout takes 0; write -1 to switch top_k off"
        )
    return top_k


def _call_format(name: str) -> str:
    if name != "auto":
        from conversations.errors import CallFormatError
        from conversations.formats.registry import format_named

        try:
            format_named(name)
        except CallFormatError as error:
            raise PydanticCustomError("call_format", "{text}", {"text": str(error)}) from error
    return name


Temperature = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(_not_zero)]
"""SGLang's scheduler keeps it in 32 bits, and ends if it does not fit."""
Count = Annotated[int, Field(ge=0)]


SGLANG_LOAD_FORMATS = (
    "auto",
    "pt",
    "safetensors",
    "npcache",
    "dummy",
    "sharded_state",
    "gguf",
    "bitsandbytes",
    "layered",
    "remote",
    "remote_instance",
)

ROLLOUT_OWNED = {
    "model_path": "model_path",
    "skip_tokenizer_init": "rollout.skip_tokenizer_init",
    "tp_size": "rollout.tensor_model_parallel_size",
    "dp_size": "rollout.data_parallel_size",
    "ep_size": "rollout.expert_parallel_size",
    "pp_size": "rollout.pipeline_model_parallel_size",
    "max_running_requests": "rollout.max_num_seqs",
    "mem_fraction_static": "rollout.gpu_memory_utilization",
    "dtype": "rollout.dtype",
    "load_format": "rollout.load_format",
}
"""SGLang arguments that a rollout key sets: `engine_kwargs.sglang` must not set them a second time.
"""

TEXT_ARGUMENTS = (
    "tool_call_parser",
    "reasoning_parser",
    "chat_template",
    "completion_template",
    "tool_server",
)
"""SGLang arguments about text: they belong to its HTTP server, which does not run here."""


def _engine_is(name: str) -> When:
    return lambda rollout: bool(rollout.name == name)


def _engine_is_not(name: str) -> When:
    return lambda rollout: bool(rollout.name != name)


def _sets(argument: str) -> When:
    return lambda rollout: argument in rollout.engine_kwargs.sglang


TRAINER = NoEffect("it belongs to verl's trainer; outside a trainer it changes nothing")
AGENT_LOOP = NoEffect(
    "verl's agent loop workers are not used; one loop of ours runs every conversation"
)
SERVER = NoEffect(
    "the server was started with its own settings; only the tokenizer of model_path is read here",
    _engine_is("sglang_server"),
)
SCRIPTED = NoEffect(
    "the scripted engine plays recorded ids: nothing is loaded and nothing is sampled",
    _engine_is("scripted"),
)
ASKED_ONCE = NoEffect(
    "a gateway's sessions are opened one by one, and all are sampled alike", uses=("gateway",)
)
PROGRAMS_OWN = NoEffect(
    "an agent program brings its own tools, users and context, and answers its own calls",
    uses=PROGRAMS,
)
NEVER_READ = "verl 0.6.1 never reads it"


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


class Context(Section):
    """A long conversation goes on from a summary that the model writes: a branch of the record.

    `compact_at`: before a prompt of so many tokens. `keep`: the last turns that stand word for word
    behind the summary.
    """

    compact_at: PositiveInt
    keep: Count = 0


class MultiTurn(Section):
    """Turns and tools.

    Lengths are tokens; None is no limit, `rollout.max_model_len // 3` for the turns.
    """

    enable: Annotated[
        bool,
        Switch(),
        NoEffect(
            "an agent program may have any number of turns; max_assistant_turns limits them",
            lambda rollout: not rollout.multi_turn.enable,
            uses=PROGRAMS,
        ),
    ] = False
    max_assistant_turns: PositiveInt | None = None
    tool_config_path: Annotated[str | None, PROGRAMS_OWN] = None
    max_user_turns: Annotated[
        Count | None,
        PROGRAMS_OWN,
        NoEffect(
            "without multi_turn.interaction_config_path no user answers",
            lambda rollout: rollout.multi_turn.interaction_config_path is None,
        ),
    ] = None
    max_parallel_calls: Annotated[PositiveInt, PROGRAMS_OWN] = 16
    max_tool_response_length: Annotated[PositiveInt, PROGRAMS_OWN] = 256
    tool_response_truncate_side: Annotated[Literal["left", "middle", "right"], PROGRAMS_OWN] = (
        "middle"
    )
    interaction_config_path: Annotated[str | None, PROGRAMS_OWN] = None
    use_inference_chat_template: Annotated[
        bool,
        Refused(
            "the engine always sees the tokens that were sampled, never a history rendered "
            "again; set it to false or leave it out",
            lambda rollout: rollout.multi_turn.use_inference_chat_template,
        ),
    ] = False
    tokenization_sanity_check_mode: Annotated[
        Literal["disable", "strict", "ignore_strippable"],
        NoEffect("there is nothing to check: tokens are never decoded and encoded again"),
    ] = "strict"
    format: Annotated[
        str,
        AfterValidator(_call_format),
    ] = "auto"
    """How the model writes tool calls: a format, or `auto`: proven from the chat template."""
    context: Annotated[Context | None, PROGRAMS_OWN] = None
    num_repeat_rollouts: Annotated[
        int | None, NoEffect(f"{NEVER_READ}; rollout.n is the number of samples of a task")
    ] = None


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


class ServerSection(Section):
    """The SGLang servers of `name: sglang_server`. Times are seconds.

    `urls` and `api_key` are ours.

    One turn is sent at most `max_attempts` times. While no server is up, or the queue is full,
    turns wait for `max_start_wait_time`.
    """

    timeout: PositiveFloat = 3600.0
    max_attempts: PositiveInt = 8
    retry_delay: Annotated[
        float,
        Field(ge=0.0),
        NoEffect(
            "retries wait 0.25 to 0.5 s (at random), twice as long each time, 8 s at most",
            _engine_is("sglang_server"),
        ),
    ] = 2.0
    max_connections: PositiveInt = 1000
    max_start_wait_time: PositiveFloat = 300.0
    urls: Annotated[
        list[str],
        Refused(
            "name: sglang_server needs at least one address; "
            "write server: {urls: ['http://HOST:30000']}",
            lambda rollout: rollout.name == "sglang_server" and not rollout.server.urls,
        ),
        Refused(
            "every address must start with http:// or https://",
            lambda rollout: any(
                not url.startswith(("http://", "https://")) for url in rollout.server.urls
            ),
        ),
    ] = Field(default_factory=list)
    api_key: str | None = None
    """None: the environment's SGLANG_API_KEY. It is never written to a run."""


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


_SGLANG_ARGUMENTS: dict[str, Refused | NoEffect] = {
    **{
        argument: Refused(f"is set by {key}; write it there", _sets(argument))
        for argument, key in ROLLOUT_OWNED.items()
    },
    **dict.fromkeys(
        TEXT_ARGUMENTS,
        NoEffect(
            "the engine sees token ids only: turntrace renders the prompt with the model's own "
            "chat template and reads the calls itself"
        ),
    ),
}


class EngineKwargs(Section):
    """Arguments handed to the engine by its own names: SGLang's `ServerArgs`."""

    sglang: Annotated[dict[str, Any], SERVER, SCRIPTED, Inside(_SGLANG_ARGUMENTS)] = Field(
        default_factory=dict
    )
    vllm: Annotated[dict[str, Any], NoEffect("the engine is SGLang")] = Field(default_factory=dict)


class EvidenceKeys(Section):
    """What to ask of the engine for each token; it goes to `evidence/` in the run folder."""

    top_logprobs: Annotated[int, Field(ge=0)] = 0
    """So many of the likeliest tokens at each sampled place, with their log-probs."""
    sampling_mask: Annotated[
        bool,
        Refused(
            "the installed SGLang gives no sampling masks; 0.5.16 and later do",
            lambda rollout: (
                rollout.turntrace.evidence.sampling_mask
                and rollout.name == "sglang"
                and not _sglang_takes("sampling_mask_max_tokens")
            ),
        ),
        Refused(
            "SGLang gives sampling masks with a finite rollout.top_k only; set one",
            lambda rollout: (
                rollout.turntrace.evidence.sampling_mask
                and rollout.do_sample
                and rollout.temperature > 0
                and rollout.top_k == -1
            ),
        ),
    ] = False
    """The tokens that top-k and top-p left to sample from."""
    routed_experts: Annotated[
        bool,
        Refused(
            "the installed SGLang gives no routed experts; 0.5.12 and later do",
            lambda rollout: (
                rollout.turntrace.evidence.routed_experts
                and rollout.name == "sglang"
                and not _sglang_takes("enable_return_routed_experts")
            ),
        ),
    ] = False
    """The experts that each layer chose. A server needs `--enable-return-routed-experts`."""


def _sglang_takes(argument: str) -> bool:
    """Whether the installed SGLang has that argument; true if none is installed, as on a server."""
    known = sglang_arguments()
    return known is None or argument in known


class Images(Section):
    """Limits of images, checked before one is decoded."""

    count: PositiveInt = 64
    """Images of one conversation, the task's and its tools' together."""
    pixels: PositiveInt = 4096 * 4096
    """Width times height of one image as given; the processor makes it smaller."""
    bytes: PositiveInt = 20 << 20
    """Size of one image as given: of the file, or of what the data URL holds."""


class Turntrace(Section):
    """Keys of this runtime. verl does not see them."""

    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `enable_thinking: false`."""
    max_consecutive_invalid_calls: Annotated[PositiveInt | None, PROGRAMS_OWN] = 8
    """Invalid calls in a row that end a conversation with `invalid_tool_calls`; None: never."""
    conversation_deadline_s: PositiveFloat | None = None
    """Seconds until a conversation ends with `deadline`, over all resumes; None: never."""
    max_tokens: PositiveInt | None = None
    """Tokens one turn may sample; None: what the other budgets leave."""
    session_length: Annotated[
        PositiveInt | None, NoEffect("only with --agent or a gateway", uses=("run",))
    ] = None
    """Tokens a gateway's session may sample and add, over its branches; None: response_length."""
    format_unproven: bool = False
    """Take `multi_turn.format` although the chat template does not prove it."""
    images: Images = Field(default_factory=Images)
    """Limits of images, for models that see."""
    calls_in_thoughts: bool = False
    """Run the calls that stand inside a thought; else they are part of the thought."""
    evidence: Annotated[
        EvidenceKeys,
        SCRIPTED,
        NoEffect("no evidence is kept of agent programs' sessions", uses=PROGRAMS),
    ] = EvidenceKeys()
    """Per-token evidence; see agent/engines/README.md."""
    recorded: Annotated[
        str | None,
        Refused(
            "name: scripted needs the run folder whose turns it plays",
            lambda rollout: rollout.name == "scripted" and not rollout.turntrace.recorded,
        ),
        NoEffect("recorded turns are played only with name: scripted", _engine_is_not("scripted")),
    ] = None
    """With `name: scripted`: the run folder or trajectories.jsonl whose tokens are played."""


class Rollout(Section):
    """The `rollout:` block, in verl's order, then ours."""

    name: Literal["sglang", "sglang_server", "scripted"] = "sglang"
    mode: Annotated[
        Literal["async", "sync"],
        SERVER,
        SCRIPTED,
        Warned(
            lambda rollout: (
                "warning: rollout.mode: sync is deprecated (only verl's own synchronous trainers "
                "still need it); write async"
            ),
            lambda rollout: rollout.name == "sglang" and rollout.mode == "sync",
        ),
    ] = "async"
    temperature: Annotated[Temperature, SCRIPTED] = 1.0
    top_k: Annotated[TopK, SCRIPTED] = -1
    top_p: Annotated[Share, SCRIPTED] = 1.0
    do_sample: Annotated[bool, SCRIPTED] = True
    n: Annotated[
        PositiveInt,
        Warned(
            lambda rollout: (
                f"warning: rollout.n: {rollout.n} greedy samples of a task are all the same; "
                "set do_sample: true and a temperature above 0"
            ),
            lambda rollout: rollout.n > 1 and (not rollout.do_sample or rollout.temperature == 0),
        ),
        ASKED_ONCE,
    ] = 1
    over_sample_rate: Annotated[
        float,
        Field(ge=0.0, lt=1.0),
        NoEffect("agent programs are run to their end, and none is aborted", uses=PROGRAMS),
    ] = 0.0
    prompt_length: Annotated[
        PositiveInt,
        NoEffect(
            "an agent program's prompt may be as long as max_model_len",
            lambda rollout: rollout.max_model_len is not None,
            uses=PROGRAMS,
        ),
    ] = 512
    response_length: Annotated[
        PositiveInt,
        NoEffect(
            "turntrace.session_length takes its place, and max_model_len is given",
            lambda rollout: (
                rollout.max_model_len is not None and rollout.turntrace.session_length is not None
            ),
            uses=PROGRAMS,
        ),
    ] = 512
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "half", "float32", "float"] | None, SERVER, SCRIPTED
    ] = None
    """None: bfloat16; float32 on a CPU without bf16 instructions."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0), SERVER, SCRIPTED] = 0.5
    ignore_eos: Annotated[bool, SCRIPTED] = False
    enforce_eager: Annotated[bool, SERVER, SCRIPTED] = False
    cudagraph_capture_sizes: Annotated[list[int] | None, SERVER, SCRIPTED] = None
    free_cache_engine: Annotated[bool, SERVER, SCRIPTED] = True
    data_parallel_size: Annotated[PositiveInt, SERVER, SCRIPTED] = 1
    expert_parallel_size: Annotated[
        PositiveInt,
        SERVER,
        SCRIPTED,
        Refused(
            "must be 1 or tensor_model_parallel_size * data_parallel_size",
            lambda rollout: (
                rollout.expert_parallel_size
                not in (1, rollout.tensor_model_parallel_size * rollout.data_parallel_size)
            ),
        ),
    ] = 1
    tensor_model_parallel_size: Annotated[PositiveInt, SERVER, SCRIPTED] = 1
    pipeline_model_parallel_size: Annotated[
        PositiveInt,
        SERVER,
        SCRIPTED,
        Refused(
            "no pipeline in process: verl's SGLangRollout has none, and SGLang's own under it "
            "hangs on a CPU and is unproven on GPUs; use tensor_model_parallel_size, "
            "data_parallel_size, or a server with name: sglang_server",
            lambda rollout: rollout.name == "sglang" and rollout.pipeline_model_parallel_size > 1,
        ),
    ] = 1
    max_num_batched_tokens: Annotated[PositiveInt, SERVER, SCRIPTED] = 8192
    val_kwargs: Annotated[Sampling, SCRIPTED, ASKED_ONCE] = Sampling()
    max_model_len: Annotated[
        PositiveInt | None,
        Refused(
            "is smaller than prompt_length + response_length; raise it, or lower one of the two",
            lambda rollout: (
                rollout.max_model_len is not None
                and rollout.max_model_len < rollout.prompt_length + rollout.response_length
            ),
        ),
    ] = None
    max_num_seqs: Annotated[
        PositiveInt,
        NoEffect(
            "programs ask when they like, and the engine is not of this process",
            _engine_is_not("sglang"),
            uses=("gateway",),
        ),
    ] = 1024
    log_prob_micro_batch_size: Annotated[int | None, TRAINER] = None
    log_prob_micro_batch_size_per_gpu: Annotated[int | None, TRAINER] = None
    log_prob_use_dynamic_bsz: Annotated[bool, TRAINER] = False
    log_prob_max_token_len_per_gpu: Annotated[int, TRAINER] = 16384
    disable_log_stats: Annotated[bool, SERVER, SCRIPTED] = True
    multi_stage_wake_up: Annotated[bool, TRAINER] = False
    engine_kwargs: EngineKwargs = EngineKwargs()
    calculate_log_probs: Annotated[
        bool,
        NoEffect(
            "log-probs are always recorded; the key decides about rollout_log_probs inside a "
            "verl trainer only"
        ),
    ] = False
    agent: Annotated[AgentLoop, AGENT_LOOP] = AgentLoop()
    trace: Annotated[
        Trace,
        NoEffect(
            "verl's tracing is not used; every conversation is in the run folder, with all of "
            "its tokens"
        ),
    ] = Trace()
    multi_turn: Annotated[
        MultiTurn,
        NoEffect(
            "multi_turn.enable is false: each conversation is one turn without tools",
            lambda rollout: not rollout.multi_turn.enable,
            uses=("run",),
        ),
    ] = MultiTurn()
    server: Annotated[
        ServerSection,
        NoEffect(
            "servers are asked only with name: sglang_server", _engine_is_not("sglang_server")
        ),
    ] = ServerSection()
    prometheus: Annotated[Prometheus, NoEffect("this version exports no metrics")] = Prometheus()
    update_weights_bucket_megabytes: Annotated[int, TRAINER] = 512
    skip_rollout: Annotated[
        bool,
        Refused(
            "recorded rollouts are never served instead of new ones; set it to false",
            lambda rollout: rollout.skip_rollout,
        ),
        TRAINER,
    ] = False
    skip_dump_dir: Annotated[str, TRAINER] = "/tmp/rollout_dump"
    profiler: Annotated[Profiler | None, NoEffect("verl's profiler is not used")] = None
    enable_chunked_prefill: Annotated[bool, SERVER, SCRIPTED] = True
    enable_prefix_caching: Annotated[bool, SERVER, SCRIPTED] = True
    load_format: Annotated[
        str,
        SERVER,
        SCRIPTED,
        Refused(
            f"SGLang has no such loader; allowed are {', '.join(SGLANG_LOAD_FORMATS)}",
            lambda rollout: (
                not rollout.load_format.startswith("dummy")
                and rollout.load_format not in SGLANG_LOAD_FORMATS
            ),
        ),
        Warned(
            lambda rollout: (
                f"WARNING: rollout.load_format: {rollout.load_format}: RANDOM weights, the text "
                "is noise; write auto to load the model"
            ),
            lambda rollout: rollout.name == "sglang" and rollout.load_format.startswith("dummy"),
        ),
    ] = "auto"
    layered_summon: Annotated[bool, TRAINER] = False
    layer_name_map: Annotated[dict[str, Any], TRAINER] = Field(default_factory=dict)
    sglang_engine_mode: Annotated[
        str,
        Refused(
            f"{NEVER_READ}; for servers write name: sglang_server and server.urls",
            lambda rollout: rollout.sglang_engine_mode != "local",
        ),
        NoEffect(f"{NEVER_READ}; rollout.name chooses the engine"),
    ] = "local"
    limit_images: Annotated[int | None, NoEffect("messages are text only")] = None
    skip_tokenizer_init: Annotated[
        bool,
        SERVER,
        SCRIPTED,
        Refused(
            "mode async needs skip_tokenizer_init: true, because token ids go in and out; "
            "set it to true or leave it out",
            lambda rollout: (
                rollout.name == "sglang"
                and rollout.mode == "async"
                and not rollout.skip_tokenizer_init
            ),
        ),
        NoEffect(
            "token ids go in and out in mode sync too, so the engine never loads a tokenizer",
            lambda rollout: not rollout.skip_tokenizer_init,
        ),
    ] = True
    turntrace: Turntrace = Turntrace()


class ConfigFile(Section):
    """The whole of config.yaml."""

    model_path: str
    rollout: Rollout = Rollout()


FATES = fates_of(Rollout)
"""The fates of all keys by their paths under `rollout`."""

OURS = ("turntrace", "server.urls", "server.api_key", "multi_turn.context")
"""Keys under `rollout` that verl does not have."""

OUR_DEFAULTS = {
    "name": "verl has none",
    "mode": "the documented set-up is asynchronous",
    "skip_tokenizer_init": "token ids go in and out; rollout.yaml says so too",
    "tensor_model_parallel_size": "one device is what most machines have",
    "dtype": "float32 is twice as fast as bfloat16 on a CPU without bf16 instructions",
    "enforce_eager": "rollout.yaml's, because CUDA graphs are most of a small model's speed",
    "load_format": "outside a trainer no weights are synced into a dummy",
    "server.max_attempts": "each restart of a server costs the turns in flight one",
    "server.timeout": "a long turn on a busy server takes more than verl's 60 s",
    "multi_turn.format": "the chat template proves it",
    "multi_turn.max_parallel_calls": "one call a turn is not what parallel means",
    "val_kwargs.temperature": "rollout.yaml's, greedy, which is what verl's trainers use",
    "val_kwargs.do_sample": "rollout.yaml's, greedy, which is what verl's trainers use",
}
"""The defaults that are not those of verl's dataclass, and why."""


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
