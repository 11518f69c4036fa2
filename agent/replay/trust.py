"""What a run folder, whose run.json says what to import and call, may decide on this machine.

Invariant: a run folder may come from anybody. Nothing that it names is imported, and no address
that it names is called, unless the user says so. Turntrace's own tools are allowed if they stay on
this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.config.config import Config, load_config
from agent.errors import AgentError, ConfigError
from agent.loop.users import Interactions
from agent.replay.request import ReplayRequest
from agent.runs.parts import config_interactions
from conversations.run.open_run import Run
from tools.registry import load_tools, tool_entries, tools_from_text
from tools.toolset import ToolSet

HARMLESS = frozenset(
    {
        "random_seed",
        "max_total_tokens",
        "attention_backend",
        "sampling_backend",
        "cuda_graph_bs",
        "cuda_graph_max_bs",
    }
    | {
        "chunked_prefill_size",
        "disable_cuda_graph",
        "disable_radix_cache",
        "disable_overlap_schedule",
        "log_level",
    }
)
"""SGLang arguments that a run's config may set: others read files, open ports, run code."""
OWN_TOOLS = frozenset(
    {
        "tools.gsm8k.Gsm8kTool",
        "tools.geo3k.Geo3kTool",
        "tools.search.SearchTool",
        "tools.sandbox.SandboxFusionTool",
    }
)
"""Shipped tools that are safe with any config that names no address. MCP's starts any command."""
LOAD_FORMATS = ("auto", "safetensors")
_OWN_KEYS = frozenset({"class_name", "class_path", "config", "tool_schema"})


def replay_config(run: Run, request: ReplayRequest) -> Config:
    """The config to replay with: the file the user gave, else the run's own, with their overrides.

    Raises ConfigError, in one line, also if a live model would do what only the run says.
    """
    recorded = run.manifest.get("config")
    if request.config is None and not isinstance(recorded, dict):
        raise ConfigError(f"{run.path}/run.json holds no config; give the run's with --config FILE")
    if isinstance(recorded, dict) and run.manifest.get("gateway") is True:
        recorded = _with_room(recorded)
    config = load_config(
        request.config,
        request.overrides,
        recorded=None if request.config else recorded,
        starts_engine=request.live_model,
    )
    if request.live_model and request.config is None:
        _check_engine(config, run)
    return config


def _with_room(recorded: dict[str, Any]) -> dict[str, Any]:
    """A gateway's config, whose `prompt_length` is all of `max_model_len`, as a run's may be."""
    rollout = recorded.get("rollout")
    names = ("prompt_length", "response_length", "max_model_len")
    if not isinstance(rollout, dict):
        return recorded
    lengths: list[Any] = [rollout.get(name) for name in names]
    if not all(type(length) is int for length in lengths):
        return recorded
    _, response, whole = lengths
    return {**recorded, "rollout": {**rollout, "prompt_length": max(1, whole - response)}}


def _check_engine(config: Config, run: Run) -> None:
    rollout = config.rollout
    given = [path.removeprefix("rollout.") for path in config.given]

    def is_given(key: str) -> bool:
        return any(f"{key}.".startswith(f"{path}.") for path in given)

    if rollout.name == "sglang_server" and not is_given("server.urls"):
        named = ", ".join(rollout.server.urls)
        raise ConfigError(
            f"{run.path} names the servers {named}, which a run may not: "
            f"use --set 'rollout.server.urls=[\"{named}\"]'"
        )
    for key in rollout.engine_kwargs.sglang:
        if key not in HARMLESS and not is_given(f"engine_kwargs.sglang.{key}"):
            raise ConfigError(
                f"{run.path} sets rollout.engine_kwargs.sglang.{key}, which a run may not: "
                "use --set, or give --config"
            )
    if rollout.load_format not in LOAD_FORMATS and not is_given("load_format"):
        raise ConfigError(
            f"{run.path} sets rollout.load_format: {rollout.load_format}, which a run may not: "
            "use --set"
        )


def live_interactions(request: ReplayRequest, config: Config) -> Interactions | None:
    """The interactions to run: those of the config if tools are live and the user allowed them.

    They are code: the user names their file, gives the config, or trusts the run.
    """
    is_given = (
        request.trust_tools
        or request.config is not None
        or "rollout.multi_turn.interaction_config_path" in config.given
    )
    return config_interactions(config) if request.live_tools and is_given else None


def live_tools(run: Run, request: ReplayRequest, config: Config) -> ToolSet | None:
    """The tools to run: the ones given, else those of the given config, else those in run.json.

    None if the run had none.

    Raises ToolConfigError, and AgentError for tools of the run that the user has not trusted.
    """
    given = request.tools_config or (config.tool_config_path if request.config else None)
    if given is not None:
        return load_tools(given)
    text = run.manifest.get("tools")
    if not isinstance(text, str) or not text:
        if any(record["tools"] for record in run.records(check=False)):
            raise AgentError(
                f"{run.path}/run.json does not hold the tools of the run; "
                "give them with --tools-config FILE"
            )
        return None
    if request.trust_tools:
        return tools_from_text(text, _origin(run, config))
    for problem in _untrusted(text, run.path / "run.json"):
        raise AgentError(
            f"{run.path}/run.json {problem}; give the tools with --tools-config FILE, "
            "or use --trust-tools to take the run's"
        )
    return tools_from_text(text, run.path / "run.json")


def _untrusted(text: str, file: Path) -> Iterator[str]:
    """What is unsafe about the tools there: imports that are not turntrace's own, addresses."""
    for entry in tool_entries(text, file):
        own = (
            isinstance(entry, Mapping)
            and set(entry) <= _OWN_KEYS
            and (entry.get("class_name") or entry.get("class_path")) in OWN_TOOLS
        )
        if not own:
            yield f"names a tool that is not turntrace's own ({_target(entry):.200})"
        for address in _addresses(entry):
            yield f"has a tool that calls {address:.200}"


def _target(entry: Any) -> str:
    named = (
        [str(entry[key]) for key in sorted(map(str, entry)) if key not in ("config", "tool_schema")]
        if isinstance(entry, Mapping)
        else []
    )
    return ", ".join(named) or type(entry).__name__


def _addresses(value: Any) -> Iterator[str]:
    if isinstance(value, str) and "://" in value:
        yield value
    for item in (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    ):
        yield from _addresses(item)


def _origin(run: Run, config: Config) -> Path:
    """Where the tools' YAML was when the run was made, so that modules beside it are found."""
    path = config.rollout.multi_turn.tool_config_path
    return Path(path) if path and Path(path).is_file() else run.path / "run.json"
