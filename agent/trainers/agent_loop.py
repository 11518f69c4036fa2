"""TurntraceAgentLoop: a verl 0.8 or 0.9 trainer's conversations through turntrace's own loop.

The file that `actor_rollout_ref.rollout.agent.agent_loop_config_path` names chooses it and holds
its options:

    - name: turntrace
      _target_: agent.verl_agent_loop.TurntraceAgentLoop

Invariant: verl gets the conversation's own token sequence, mask 1 exactly where the engine sampled,
and at least one response token. A conversation that cannot be trained on (infrastructure failed, or
the trainer aborted it) has mask 0 throughout. Values that verl has no field for stand under
`extras["turntrace"]`.

Importing it imports verl and torch; only verl's own workers do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.experimental.agent_loop.utils import resolve_config_path
from verl.tools.function_tool import FunctionTool, normalize_function_tool_return
from verl.utils.rollout_trace import rollout_trace_op

from agent.config.config import Config
from agent.errors import ConfigError
from agent.loop.batch import run_conversations
from agent.loop.conversation import Conversation
from agent.loop.record import trajectory_of
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.runs.manifest import versions
from agent.runs.parts import config_interactions, config_tools, make_template, prepare
from agent.trainers.client import VerlClientEngine
from agent.trainers.layout import batch_tasks, has_failed, why_not_trained, without_response
from agent.trainers.options import (
    TrainerOptions,
    checked_options,
    engine_sampling,
    manifest,
    trainer_config,
)
from agent.trainers.step_folders import StepFolders
from conversations.branches import rows
from conversations.images.placing import PlacedImage, spans_of
from conversations.images.processor import collapsed, processor_of
from conversations.rounds import is_sampled
from conversations.trajectory import Trajectory
from tools.toolset import LoadedTool, ToolSet, loaded_tool

logger = logging.getLogger(__name__)


class AgentLoopOptions(TrainerOptions):
    """The keys beside `name` and `_target_`.

    `tool_config_path`: a tools.yaml that verl itself could not read, or a shipped one's name;
    without it the trainer's `multi_turn.tool_config_path` counts. `interaction_config_path`: verl
    dropped its own key in 0.7. `reward_from_tools`: the trajectory's reward (tools' and user's) is
    the score, and the trainer's reward function is not called.
    """

    tool_config_path: str | None = None
    interaction_config_path: Path | None = None
    reward_from_tools: bool = False


class TurntraceAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """One conversation. What the conversations of a worker share is made once, as `_Worker`."""

    def __init__(
        self, *args: Any, tools: Any = None, name: str = "turntrace", **kwargs: Any
    ) -> None:
        """Takes `AgentLoopBase`'s arguments, verl's tools, and the `AgentLoopOptions`.

        Raises ConfigError.
        """
        theirs = {key: kwargs.pop(key) for key in VERLS if key in kwargs}
        super().__init__(*args, **theirs)
        given = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in kwargs.items()
        }
        options = checked_options(AgentLoopOptions, given, f"agent loop {name}")
        self._worker = _Worker.of(self, options, tools.tools if tools else [])

    @rollout_trace_op  # type: ignore[untyped-decorator]
    async def run(
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Runs the conversation. `kwargs` are the row's columns.

        Under verl 0.9's own trainer a conversation that cannot be trained on is an empty list: its
        group then has a row less, and no reward of 0 enters the group's mean.

        Raises TaskError for a row that is not a task, such as one that chooses an interaction which
        does not exist.
        """
        worker = self._worker
        await worker.start_tools()
        columns = {key: [value] for key, value in kwargs.items()}
        [(task, sample)] = batch_tasks(columns, worker.parts.interactions)
        engine = VerlClientEngine(
            self.server_manager, worker.description, self._request_id(kwargs), worker.drifts()
        )
        conversation = Conversation(
            worker.offered(task), sample, worker.runtime(engine, sampling_params)
        )
        progress = await run_conversations([conversation], store=worker.store)
        record = trajectory_of(conversation)
        if reason := why_not_trained(record):
            logger.warning("conversation %s is not trained on: %s", record.task_id, reason)
        for lost in progress.lost:
            logger.warning("a record is lost: %s", lost)
        if worker.takes_lists and _is_untrainable(record):
            return []
        rewards = conversation.user.rewards if conversation.user else []
        if worker.takes_lists and record.branches:  # each sampled token in one row, one GRPO sample
            parts = [row.trajectory for row in rows(record)]
            return [await self._output(one, conversation, engine, rewards) for one in parts]
        return await self._output(record, conversation, engine, rewards)

    async def _output(
        self,
        one: Trajectory,
        conversation: Conversation,
        engine: VerlClientEngine,
        rewards: list[float],
    ) -> AgentLoopOutput:
        """A row for verl, with the images whose tokens lie in it."""
        output = self._worker.output(one, engine, rewards)
        if images := self._worker.shown(one).images:
            seen = [conversation.pictures[image["sha256"]] for image in images]
            decoded = await asyncio.to_thread(lambda: [picture.image() for picture in seen])
            output.multi_modal_data = {"images": decoded}
        return output

    def _request_id(self, columns: Mapping[str, Any]) -> str | None:
        """verl's own id if runs must repeat; else None, a fresh one."""
        deterministic = getattr(self.rollout_config, "full_determinism", False)
        return f"det-{int(columns.get('priority', 0))}" if deterministic else None


VERLS = (
    "trainer_config",
    "server_manager",
    "tokenizer",
    "processor",
    "dataset_cls",
    "data_config",
    "hf_model_type",
)
"""The arguments that verl's worker gives to every agent loop beside the tools."""


class _Worker:
    """The parts that the conversations of one worker process share.

    Template, tools, interactions, run folders; one for each set of options.
    """

    _made: dict[tuple[int, str], _Worker] = {}  # noqa: RUF012 - for as long as the process lives

    @classmethod
    def of(
        cls, loop: TurntraceAgentLoop, options: AgentLoopOptions, verls_tools: list[Any]
    ) -> _Worker:
        key = id(loop.tokenizer), options.model_dump_json()
        if key not in cls._made:
            cls._made[key] = cls(loop, options, verls_tools)
        return cls._made[key]

    def __init__(
        self, loop: TurntraceAgentLoop, options: AgentLoopOptions, verls_tools: list[Any]
    ) -> None:
        self.config, self.options = loop.rollout_config, options
        self.tokenizer = loop.tokenizer  # held: its id is the key
        if self.config.get("enable_rollout_routing_replay"):
            raise ConfigError(
                "rollout.enable_rollout_routing_replay is not supported by turntrace's agent loop"
            )
        model = str(loop.config.actor_rollout_ref.model.path)
        ours = _config(loop, options, model)
        self.parts = prepare(
            ours,
            _tools(ours, verls_tools),
            config_interactions(ours),
            template=make_template(ours, loop.tokenizer, processor_of(loop.processor)),
        )
        self.description = {
            "name": f"verl:{self.config.name}",
            "model": Path(model).name,
            "verl": versions()["verl"],
        }
        self.store = (
            StepFolders(options.save_to, self._manifest, loop.tokenizer)
            if options.save_to
            else None
        )
        self._starting: asyncio.Future[None] | None = None
        self.takes_lists = bool(OmegaConf.select(loop.config, "transfer_queue.enable"))
        """verl 0.9's own trainer keeps samples in a queue and takes any number of rows from a
        conversation; its older one takes exactly one."""

    async def start_tools(self) -> None:
        """Starts the tools once; other conversations wait for that.

        Raises ToolsError to all of them.
        """
        if self.parts.tools and self._starting is None:
            self._starting = asyncio.ensure_future(self.parts.tools.start())
        if self._starting:
            await asyncio.shield(self._starting)

    def offered(self, task: Task) -> Task:
        """The task with its tools chosen as verl's own loop does.

        `extra_info.tool_selection` chooses, `tools_kwargs` does not.
        """
        if not self.parts.tools:
            return task
        info = (task.extra or {}).get("extra_info") or {}
        names = info.get("tool_selection") or [*self.parts.tools, *task.tools_kwargs]
        return dataclasses.replace(
            task, tools_kwargs={name: task.tools_kwargs.get(name, {}) for name in names}
        )

    def drifts(self) -> Callable[[Sequence[int], Sequence[PlacedImage]], bool] | None:
        """Whether verl's server changes a prompt with images; None if it keeps its ids.

        verl hands its ids to SGLang, which decodes and encodes them beside images; vLLM takes them.
        """
        template = self.parts.template
        if self.config.name != "sglang" or template.images is None:
            return None

        def drifts(ids: Sequence[int], images: Sequence[PlacedImage]) -> bool:
            short = collapsed(ids, spans_of(images))
            return template.encode(template.decode(short)) != short

        return drifts

    def runtime(self, engine: VerlClientEngine, sampling: Mapping[str, Any]) -> Runtime:
        return self.parts.runtime(engine, engine_sampling(sampling))

    def shown(self, one: Trajectory) -> Trajectory:
        """The trajectory as verl may see it: of a model that sees, no response that failed."""
        failed = has_failed(one) and self.parts.template.images is not None
        return without_response(one) if failed else one

    def output(
        self, one: Trajectory, engine: VerlClientEngine, turn_scores: list[float]
    ) -> AgentLoopOutput:
        """The conversation as verl pads and trains on it.

        A prompt over the budget, after which nothing was sampled, is cut on the left as verl does.
        """
        one = self.shown(one)
        ids, mask = one.response_ids, one.response_mask
        logprobs = [value or 0.0 for value in one.response_logprobs]
        if _is_untrainable(one):
            mask = [0] * len(ids)
        # verl's worker can neither pad an empty list nor score it
        nothing = [self.parts.template.end_id]
        if not ids:
            ids, mask, logprobs = nothing, [0], [0.0]
        score = (one.reward or 0.0) if self.options.reward_from_tools else None
        return AgentLoopOutput(
            prompt_ids=one.prompt_ids[-self.config.prompt_length :] or nothing,
            response_ids=ids,
            response_mask=mask,
            response_logprobs=logprobs if self.config.calculate_log_probs else None,
            multi_modal_data={},
            reward_score=score,
            num_turns=1 + one.num_turns + _answered(one),
            metrics=AgentLoopMetrics(
                generate_sequences=engine.generate_s,
                tool_calls=_tool_seconds(one),
                num_preempted=-1 if engine.num_preempted is None else engine.num_preempted,
            ),
            extra_fields={
                **engine.fields,
                "turn_scores": turn_scores,
                "tool_rewards": [line.reward for line in one.tool_calls if line.reward is not None],
                "extras": {"turntrace": _extras(one)},
            },
        )

    def _manifest(self, step: str) -> dict[str, Any]:
        """A step's run.json."""
        trainer = {
            "rollout": OmegaConf.to_container(self.config, resolve=True),
            "agent_loop": self.options.model_dump(mode="json"),
        }
        return manifest(self.parts, trainer, step=step)


def _config(loop: TurntraceAgentLoop, options: AgentLoopOptions, model: str) -> Config:
    """The trainer's config as turntrace's own, with the limits of verl's servers and loops."""
    config, turns = loop.rollout_config, loop.rollout_config.multi_turn
    limits: dict[str, Any] = {}
    if config.max_model_len and config.name == "sglang":
        # verl's server keeps one token of it free.
        limits["max_model_len"] = config.max_model_len - 1
    if (rounds := turns.max_user_turns) is not None:
        # verl counts a round of tool calls as a user's turn.
        limits["max_assistant_turns"] = min(turns.max_assistant_turns or rounds + 1, rounds + 1)
    tools, users = options.tool_config_path, options.interaction_config_path
    if tools is None and turns.tool_config_path:
        tools = resolve_config_path(turns.tool_config_path)
    template_kwargs = {
        **(loop.apply_chat_template_kwargs or {}),
        **options.apply_chat_template_kwargs,
    }
    return trainer_config(
        model,
        config,
        options.model_copy(update={"apply_chat_template_kwargs": template_kwargs}),
        tool_config_path=tools,
        interaction_config_path=resolve_config_path(str(users)) if users else None,
        **limits,
    )


class _Function:
    """One of verl's function tools as a tool: no state, nothing to create or release."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool
        self.tool_schema = tool.tool_schema

    async def create(self, instance_id: str | None = None, **create_kwargs: Any) -> tuple[str, Any]:
        return instance_id or "", None

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, float | None, dict[str, Any]]:
        answer: tuple[Any, float, dict[str, Any]] = normalize_function_tool_return(
            await self._tool.call(parameters)
        )
        return answer

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        return None

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        return None


def _tools(config: Config, verls_tools: list[Any]) -> ToolSet | None:
    """The tools of the YAML, loaded by turntrace, and verl's function tools.

    Raises ToolConfigError.
    """
    loaded = config_tools(config)
    functions: list[LoadedTool] = [
        loaded_tool(_Function(tool)) for tool in verls_tools if isinstance(tool, FunctionTool)
    ]
    if not functions:
        return loaded
    others, text = (loaded.values(), loaded.source_text) if loaded else ((), "")
    return ToolSet([*others, *functions], text)


def _is_untrainable(one: Trajectory) -> bool:
    """Whether infrastructure failed the conversation, or the trainer aborted it."""
    return has_failed(one) or one.stop_reason == "cancelled"


def _answered(one: Trajectory) -> int:
    """How many turns tools or a user answered: all but a last one that nobody answered."""
    return one.num_turns - (one.num_turns > 0 and is_sampled(one.messages[-1]))


def _tool_seconds(one: Trajectory) -> float:
    """Seconds spent waiting for tools: the slowest call of each turn, summed up."""
    slowest: dict[int, float] = {}
    for line in one.tool_calls:
        slowest[line.turn] = max(
            slowest.get(line.turn, 0.0), (line.queue_s or 0.0) + (line.run_s or 0.0)
        )
    return sum(slowest.values())


def _extras(one: Trajectory) -> dict[str, Any]:
    names = (
        "task_id",
        "stop_reason",
        "infra_error",
        "error",
        "reward",
        "reward_parts",
        "num_turns",
    )
    warnings = [dataclasses.asdict(warning) for warning in one.warnings]
    return {**{name: getattr(one, name) for name in names}, "warnings": warnings}
