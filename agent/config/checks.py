"""Which keys cannot work here, and which have no effect. What would change results is refused; the harmless is reported.

Invariant: a key the user set is in one of three states, never a fourth: it works, it is refused, it is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agent.config.schema import Rollout

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
"""SGLang arguments that a rollout key sets, so that `engine_kwargs.sglang` must not: two places would contradict."""

_APPEND_ONLY = (
    "the engine always sees the very tokens that were sampled, never a re-rendered history"
)

_Refusal = tuple[str, Callable[[Rollout], bool], str]
_REFUSED: tuple[_Refusal, ...] = (
    (
        "skip_tokenizer_init",
        lambda r: r.name == "sglang" and r.mode == "async" and not r.skip_tokenizer_init,
        "mode async needs skip_tokenizer_init: true, because token ids go in and out; set it to true or leave it out",
    ),
    (
        "max_model_len",
        lambda r: (
            r.max_model_len is not None and r.max_model_len < r.prompt_length + r.response_length
        ),
        "is smaller than prompt_length + response_length; raise it, or lower one of the two",
    ),
    (
        "expert_parallel_size",
        lambda r: (
            r.expert_parallel_size not in (1, r.tensor_model_parallel_size * r.data_parallel_size)
        ),
        "must be 1 or tensor_model_parallel_size * data_parallel_size",
    ),
    (
        "pipeline_model_parallel_size",
        lambda r: r.name == "sglang" and r.pipeline_model_parallel_size > 1,
        "verl's SGLangRollout has no pipeline parallelism; use tensor_model_parallel_size, or a server with name: sglang_server",
    ),
    (
        "load_format",
        lambda r: (
            not r.load_format.startswith("dummy") and r.load_format not in SGLANG_LOAD_FORMATS
        ),
        f"SGLang has no such loader; allowed are {', '.join(SGLANG_LOAD_FORMATS)}",
    ),
    (
        "multi_turn.format",
        lambda r: r.multi_turn.format != "hermes",
        "only hermes tool calls (<tool_call>{...}</tool_call>) are read; set it to hermes or leave it out",
    ),
    (
        "multi_turn.use_inference_chat_template",
        lambda r: r.multi_turn.use_inference_chat_template,
        f"{_APPEND_ONLY}; set it to false or leave it out",
    ),
    (
        "skip_rollout",
        lambda r: r.skip_rollout,
        "recorded rollouts are never served instead of new ones; set it to false",
    ),
    (
        "sglang_engine_mode",
        lambda r: r.sglang_engine_mode != "local",
        "verl 0.6.1 never reads it; for servers write name: sglang_server and server.urls",
    ),
    (
        "server.urls",
        lambda r: r.name == "sglang_server" and not r.server.urls,
        "name: sglang_server needs at least one address; write server: {urls: ['http://HOST:30000']}",
    ),
    (
        "turntrace.recorded",
        lambda r: r.name == "scripted" and not r.turntrace.recorded,
        "name: scripted needs the run folder whose turns it plays back",
    ),
    (
        "server.urls",
        lambda r: any(not url.startswith(("http://", "https://")) for url in r.server.urls),
        "every address must start with http:// or https://",
    ),
)


def refusals(rollout: Rollout) -> Iterator[tuple[str, str]]:
    """(dotted path under `rollout`, what is wrong and what to do) for every value that cannot work."""
    for path, is_refused, text in _REFUSED:
        if is_refused(rollout):
            yield path, text
    for key in rollout.engine_kwargs.sglang:
        if key in ROLLOUT_OWNED:
            yield f"engine_kwargs.sglang.{key}", f"is set by {ROLLOUT_OWNED[key]}; write it there"


_TRAINER = "belongs to verl's trainer; outside one there is nothing it could change"
_AGENT_LOOP = "verl's agent loop workers are not used; one loop of ours runs every conversation"
_SERVER_DECIDES = "the server was started with its own settings; from here only the tokenizer of model_path is read"
_NOT_SAMPLED = (
    "the scripted engine plays recorded ids back: nothing is loaded and nothing is sampled"
)

_NO_EFFECT = {
    "calculate_log_probs": "log-probs are always recorded; it only decides about rollout_log_probs inside a verl trainer",
    "log_prob_micro_batch_size": _TRAINER,
    "log_prob_micro_batch_size_per_gpu": _TRAINER,
    "log_prob_use_dynamic_bsz": _TRAINER,
    "log_prob_max_token_len_per_gpu": _TRAINER,
    "multi_stage_wake_up": _TRAINER,
    "update_weights_bucket_megabytes": _TRAINER,
    "layered_summon": _TRAINER,
    "layer_name_map": _TRAINER,
    "skip_rollout": _TRAINER,
    "skip_dump_dir": _TRAINER,
    "agent": _AGENT_LOOP,
    "trace": "verl's tracing is not used; every conversation is in the run folder, with all of its tokens",
    "prometheus": "this version exports no metrics",
    "profiler": "verl's profiler is not used",
    "limit_images": "messages are text only",
    "engine_kwargs.vllm": "the engine is SGLang",
    "multi_turn.tokenization_sanity_check_mode": "there is nothing to check: tokens are never decoded and encoded again",
    "multi_turn.num_repeat_rollouts": "verl 0.6.1 never reads it; rollout.n is the number of samples of a task",
    "sglang_engine_mode": "verl 0.6.1 never reads it; rollout.name chooses the engine",
}
_ENGINE_KEYS = (
    "mode",
    "skip_tokenizer_init",
    "dtype",
    "gpu_memory_utilization",
    "enforce_eager",
    "cudagraph_capture_sizes",
    "data_parallel_size",
    "expert_parallel_size",
    "free_cache_engine",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "max_num_batched_tokens",
    "disable_log_stats",
    "engine_kwargs.sglang",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "load_format",
)
_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "do_sample", "ignore_eos", "val_kwargs")
_NO_SERVER = {"server": "servers are asked only with name: sglang_server"}
_NO_SCRIPT = {"turntrace.recorded": "recorded turns are played only with name: scripted"}
_SERVER_PACE = {
    "server.retry_delay": "retries wait 0.25 to 0.5 s (at random), twice as long each time, 8 s at most",
}
_BY_ENGINE = {
    "sglang": {**_NO_SERVER, **_NO_SCRIPT},
    "sglang_server": {**dict.fromkeys(_ENGINE_KEYS, _SERVER_DECIDES), **_SERVER_PACE, **_NO_SCRIPT},
    "scripted": {**dict.fromkeys((*_ENGINE_KEYS, *_SAMPLING_KEYS), _NOT_SAMPLED), **_NO_SERVER},
}


def notices(rollout: Rollout, given: Iterable[str]) -> list[str]:
    """One line for each reason why keys in `given` (dotted paths under `rollout`) have no effect, and each warning."""
    keys_by_reason: dict[str, list[str]] = {}
    for path in given:
        reason = _reason(rollout, path)
        if reason:
            keys_by_reason.setdefault(reason, []).append(f"rollout.{path}")
    ignored = [f"no effect: {', '.join(keys)}: {reason}" for reason, keys in keys_by_reason.items()]
    return [*_warnings(rollout), *ignored]


def _reason(rollout: Rollout, path: str) -> str | None:
    table = {**_NO_EFFECT, **_BY_ENGINE[rollout.name]}
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        if (reason := table.get(".".join(parts[:end]))) is not None:
            return reason
    if parts[0] == "multi_turn" and path != "multi_turn.enable" and not rollout.multi_turn.enable:
        return "multi_turn.enable is false: each conversation is one turn without tools"
    if path == "multi_turn.max_user_turns" and rollout.multi_turn.interaction_config_path is None:
        return "without multi_turn.interaction_config_path nobody takes a user turn"
    if path == "skip_tokenizer_init" and not rollout.skip_tokenizer_init:
        return "token ids go in and out in mode sync too, so the engine never loads a tokenizer"
    return None


def _warnings(rollout: Rollout) -> Iterator[str]:
    if rollout.name == "sglang" and rollout.load_format.startswith("dummy"):
        yield f"WARNING: rollout.load_format: {rollout.load_format}: RANDOM weights, the text is noise; write auto to load the model"
    if rollout.name == "sglang" and rollout.mode == "sync":
        yield "warning: rollout.mode: sync is deprecated (only verl's own synchronous trainers still need it); write async"
    if rollout.n > 1 and (not rollout.do_sample or rollout.temperature == 0):
        yield f"warning: rollout.n: {rollout.n} greedy samples of a task are all the same; set do_sample: true and a temperature above 0"
