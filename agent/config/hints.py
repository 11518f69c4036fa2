"""What to write instead of an unknown key.

In this order: a known foreign key's place here, a key in the wrong place, a misspelling, what is
allowed there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from agent.config.installed import sglang_arguments
from agent.config.schema import known_paths

_STOP = (
    "stop strings and stop ids are not taken: without a tokenizer in the engine stop strings crash "
    "its scheduler, and a turn ends at the chat template's own end token"
)
_TRAINER_BLOCK = (
    "it is a block of verl's trainer config; a file here holds `model_path:` and `rollout:` "
    "(verl's actor_rollout_ref.rollout)"
)
_SAMPLING = "penalties and minimum lengths are not supported; leave it out"
_NEWER = "a key of a newer verl that means nothing outside its trainer; leave it out"
_DTYPE = "write SGLang's own argument: rollout.engine_kwargs.sglang.quantization"

FOREIGN = {
    **dict.fromkeys(
        (
            "actor_rollout_ref",
            "data",
            "trainer",
            "algorithm",
            "critic",
            "reward_model",
            "defaults",
            "hydra",
        ),
        _TRAINER_BLOCK,
    ),
    **dict.fromkeys(
        ("function_tool_path", "function_tools"),
        "a Python function is an entry `function: module:name` of the tool config "
        "(rollout.multi_turn.tool_config_path)",
    ),
    **dict.fromkeys(("tool_kwargs", "tools_config_file"), "rollout.multi_turn.tool_config_path"),
    **dict.fromkeys(("seed", "random_seed"), "rollout.engine_kwargs.sglang.random_seed"),
    **dict.fromkeys(
        ("enable_thinking", "thinking_budget"),
        "rollout.turntrace.apply_chat_template_kwargs.",
    ),
    "chat_template_kwargs": "rollout.turntrace.apply_chat_template_kwargs",
    **dict.fromkeys(("max_turns", "max_steps"), "rollout.multi_turn.max_assistant_turns"),
    **dict.fromkeys(("max_new_tokens", "max_completion_tokens"), "rollout.turntrace.max_tokens"),
    **dict.fromkeys(("max_prompt_length", "max_prompt_tokens"), "rollout.prompt_length"),
    **dict.fromkeys(("max_response_length", "max_response_tokens"), "rollout.response_length"),
    **dict.fromkeys(("num_generations", "num_samples", "group_size"), "rollout.n"),
    **dict.fromkeys(("model", "model_name", "pretrained_model_name_or_path"), "model_path"),
    **dict.fromkeys(("base_url", "api_base", "server_url", "url"), "rollout.server.urls"),
    **dict.fromkeys(("tp", "tp_size"), "rollout.tensor_model_parallel_size"),
    **dict.fromkeys(
        (
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_new_tokens",
            "min_tokens",
        ),
        _SAMPLING,
    ),
    **dict.fromkeys(
        (
            "nnodes",
            "n_gpus_per_node",
            "checkpoint_engine",
            "disaggregation",
            "enable_rollout_routing_replay",
            "enable_sleep_mode",
            "external_lib",
            "full_determinism",
            "logprobs_mode",
            "mtp",
            "qat",
            "scheduling_policy",
            "skip",
        ),
        _NEWER,
    ),
    **dict.fromkeys(("quantization", "quantization_config_file"), _DTYPE),
}
"""Keys of newer verls, trainers and servers: what means the same here, or why nothing does.

verl's are those of its `RolloutConfig` after 0.6.1 (0.7 to 0.9).
"""


def hint(path: str) -> str:
    """What to do about the unknown dotted `path`, as the end of a sentence."""
    parent, _, name = path.rpartition(".")
    if path.startswith("rollout.engine_kwargs.sglang."):
        return _spelling(name, sglang_arguments() or (), prefix="rollout.engine_kwargs.sglang.")
    if name.startswith("stop"):
        return _STOP
    if (place := _foreign(parent, name)) or (place := _misplaced(path, name)):
        is_place = place.split(".")[0] in ("model_path", "rollout")
        return f"write it at {place}" if is_place else place
    return _spelling(name, _children(parent), prefix=f"{parent}." if parent else "")


def _foreign(parent: str, name: str) -> str | None:
    """A block of a trainer's config is foreign at the top only.

    A place that ends in a dot is a mapping.
    """
    place = FOREIGN.get(name)
    if place is None or (parent and place == _TRAINER_BLOCK):
        return None
    return f"{place}{name}" if place.endswith(".") else place


def _misplaced(path: str, name: str) -> str | None:
    """The known path that this key means: `n`, `multi_turn_enable`, or a dotted name as one key."""
    flat = path.replace(".", "_")
    for known in sorted(known_paths(), key=lambda known: known.count(".")):
        same_key = known.rpartition(".")[2] == name
        inner = known.removeprefix("rollout.")
        is_flat = "." in inner and flat.endswith(inner.replace(".", "_"))
        if same_key or is_flat:
            return known
    return None


def _children(parent: str) -> list[str]:
    prefix = f"{parent}." if parent else ""
    return [
        path.removeprefix(prefix)
        for path in known_paths()
        if path.startswith(prefix) and "." not in path.removeprefix(prefix)
    ]


def _spelling(name: str, siblings: Iterable[str], *, prefix: str) -> str:
    allowed = list(siblings)
    if near := difflib.get_close_matches(name, allowed, n=1, cutoff=0.6):
        return f"did you mean {prefix}{near[0]}?"
    by_leaf = {path.rpartition(".")[2]: path for path in reversed(known_paths())}
    if elsewhere := difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.8):
        return f"did you mean {by_leaf[elsewhere[0]]}?"
    if len(allowed) > 20:
        return "allowed there: verl's RolloutConfig keys, turntrace and server"
    return f"allowed there: {', '.join(allowed)}" if allowed else "no key has that name"
