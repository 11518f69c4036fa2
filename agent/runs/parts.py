"""The parts of a run, made from a config: chat template, tools, interactions, limits, engine.

This is the only place that makes them, for runs, replays, trainers, `InferenceEngine` and the tool
commands. A trainer maps its own config to a `Config` first.

Invariant: each part is loaded once. Nothing is started here but by `start_engine`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config.config import Config
from agent.engines.engine import Engine
from agent.engines.evidence import EvidenceRequest
from agent.engines.scripted import recorded
from agent.errors import ConfigError
from agent.loop.calls import Dispatcher
from agent.loop.compaction import ContextSettings, summary_request
from agent.loop.images import ImageReader
from agent.loop.runtime import LoopSettings, Runtime
from agent.loop.users import Interactions, load_interactions
from agent.packages import how_to_install
from conversations.extras import safetensors
from conversations.images.processor import ImageProcessor, load_processor
from conversations.images.reading import ImageLimits
from conversations.messages import tool_message
from conversations.run.saved_tokenizer import is_failure
from conversations.run.store import read_trajectories
from conversations.template import ChatTemplate, Reading
from conversations.tokenizer import TOKENIZER_FILE, read_tokenizer
from conversations.tokens import TOOL, USER
from conversations.truncate import cut_to_tokens
from tools.registry import load_tools
from tools.toolset import ToolSet


@dataclass(frozen=True, slots=True)
class Parts:
    """What the conversations of a run share, but for the engine. `prepare` makes one.

    `dispatcher` holds `tools` and their limits; None if there are no tools. `images` reads images;
    None if the model sees none.
    """

    config: Config
    template: ChatTemplate
    tools: ToolSet | None
    interactions: Interactions | None
    dispatcher: Dispatcher | None
    images: ImageReader | None = None

    def runtime(
        self, engine: Engine, sampling: Mapping[str, Any], max_tokens: int | None = None
    ) -> Runtime:
        """The parts with their engine. See `loop_settings` for `sampling` and `max_tokens`."""
        settings = loop_settings(self.config, sampling, max_tokens)
        return Runtime(
            engine,
            self.template,
            settings,
            self.dispatcher,
            interactions=self.interactions,
            images=self.images,
        )


def prepare(
    config: Config,
    tools: ToolSet | None = None,
    interactions: Interactions | None = None,
    *,
    template: ChatTemplate | None = None,
) -> Parts:
    """Puts the parts together. `template` takes the place of the one that `model_path` has.

    Raises TemplateError if the template cannot render what tools or users say, CallFormatError if
    its call format is not proven, and what `load_template` raises.
    """
    template = template or load_template(config)
    if tools:
        template.require_tools()
    if interactions:
        template.require(USER, with_tools=bool(tools))
    if config.rollout.multi_turn.context:
        _check_compaction(config, template, with_tools=bool(tools))
    images = image_reader(config, template)
    dispatcher = make_dispatcher(config, tools, template, images) if tools else None
    return Parts(config, template, tools, interactions, dispatcher, images)


def _check_compaction(config: Config, template: ChatTemplate, *, with_tools: bool) -> None:
    """Raises TemplateError if no request for a summary may stand behind tools' responses."""
    if evidence_request(config):
        raise ConfigError(
            "multi_turn.context and turntrace.evidence cannot be used together: "
            "evidence is of one sequence"
        )
    turn = {"role": "assistant", "content": "x", "raw": "x"}
    asked = summary_request()
    template.follow([asked, asked], turn, with_tools=with_tools)
    if with_tools:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        answer = tool_message("x", call_id="c", name="f")
        template.follow([answer, asked], {**turn, "tool_calls": [call]}, with_tools=True)


def config_tools(config: Config) -> ToolSet | None:
    """The tools that the config names; None if it names none. Raises ToolConfigError."""
    return load_tools(config.tool_config_path) if config.tool_config_path else None


def config_interactions(config: Config) -> Interactions | None:
    """The interactions that the config names; None if it names none. Raises ConfigError."""
    path = config.interaction_config_path
    return load_interactions(path) if path else None


def load_template(config: Config, folder: Path | None = None) -> ChatTemplate:
    """The chat template in `folder`, by default the model's.

    Raises TemplateError, and ConfigError if there is no tokenizer.
    """
    folder = folder or config.model_dir()
    tokenizer = _tokenizer(folder)
    return make_template(config, tokenizer, load_processor(folder, tokenizer))


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Only transformers can convert one without a tokenizer.json."""
    try:
        if (folder / TOKENIZER_FILE).is_file():
            return read_tokenizer(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except BaseException as error:
        if not is_failure(error):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            reason = f"without a tokenizer.json it needs transformers: {how_to_install(error.name)}"
        else:
            reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model_path: no tokenizer could be loaded from {folder}: {reason}"
        ) from error


def make_template(
    config: Config, tokenizer: Any, images: ImageProcessor | None = None
) -> ChatTemplate:
    """The tokenizer's chat template with the config's arguments. Raises TemplateError.

    `images` is the model's image processor; None if it sees none.
    """
    ours = config.rollout.turntrace
    reading = Reading(
        config.rollout.multi_turn.format, ours.format_unproven, ours.calls_in_thoughts
    )
    kwargs = ours.apply_chat_template_kwargs
    template = ChatTemplate(tokenizer, kwargs=kwargs, reading=reading, images=images)
    template.use_fast_encoder()
    return template


def image_reader(config: Config, template: ChatTemplate) -> ImageReader | None:
    """What reads the images of a run; None if the model sees none."""
    if template.images is None:
        return None
    limits = config.rollout.turntrace.images
    return ImageReader(template.images, ImageLimits(limits.count, limits.pixels, limits.bytes))


def make_dispatcher(
    config: Config, tools: ToolSet, template: ChatTemplate, images: ImageReader | None = None
) -> Dispatcher:
    """The tools with the config's limits. `images` reads what they answer with, if the template can
    show it.
    """
    multi_turn = config.rollout.multi_turn
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    cut = functools.partial(cut_to_tokens, template=template, limit=limit, side=side)
    return Dispatcher(
        tools,
        max_parallel_calls=multi_turn.max_parallel_calls,
        shorten=cut,
        images=None if images is None or template.image_problem(TOOL) else images,
        placeholder=template.holds_placeholder,
    )


def loop_settings(
    config: Config, sampling: Mapping[str, Any], max_tokens: int | None = None
) -> LoopSettings:
    """The loop's limits.

    `sampling` are the engine's sampling params, `max_tokens` overrides the config's.
    """
    rollout, ours = config.rollout, config.rollout.turntrace
    return LoopSettings(
        prompt_length=rollout.prompt_length,
        response_length=rollout.response_length,
        max_model_len=config.max_model_len,
        max_tokens=max_tokens or ours.max_tokens,
        max_turns=config.max_assistant_turns,
        max_user_turns=rollout.multi_turn.max_user_turns,
        max_consecutive_invalid_calls=ours.max_consecutive_invalid_calls,
        deadline_s=ours.conversation_deadline_s,
        context=_context(config),
        sampling=dict(sampling),
        evidence=evidence_request(config),
    )


def _context(config: Config) -> ContextSettings | None:
    context = config.rollout.multi_turn.context
    return ContextSettings(context.compact_at, context.keep) if context else None


def evidence_request(config: Config) -> EvidenceRequest | None:
    """What the config asks for of each token; None if it is nothing, or nothing is sampled."""
    asked = EvidenceRequest(**config.rollout.turntrace.evidence.model_dump())
    if not asked.flags() or config.rollout.name == "scripted":
        return None
    safetensors()  # its absence is told before anything is sampled
    return asked


def start_engine(config: Config, log_path: Path | None) -> Engine:
    """The engine that `rollout.name` names. `sglang` blocks until its processes are up.

    `log_path` is where they write; None: this process's output. Raises EngineStartError.
    """
    rollout = config.rollout
    if rollout.name == "sglang":
        from agent.engines.start import start

        return start(config.verl_rollout(), config.model_dir(), log_path=log_path).engine()
    if rollout.name == "sglang_server":
        from agent.engines.servers import SGLangServerEngine

        server = rollout.server
        return SGLangServerEngine(
            server.urls,
            config.api_key,
            max_connections=server.max_connections,
            read_timeout_s=server.timeout,
            attempts=server.max_attempts,
            wait_s=server.max_start_wait_time,
        )
    return recorded(read_trajectories(rollout.turntrace.recorded or ""))
