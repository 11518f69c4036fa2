"""`InferenceEngine("config.yaml").generate(prompts)`: the loop as a library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import PositiveInt, ValidationError

from agent.config.config import Config, load_config
from agent.config.schema import Section, Share, Temperature, TopK
from agent.errors import ConfigError, TaskError
from agent.loop.batch import run_tasks
from agent.loop.tasks import Task
from agent.runs.parts import config_interactions, prepare
from agent.runs.session import Session
from conversations.errors import MessageError
from conversations.messages import GivenImages, given_messages
from conversations.rounds import last_sampled
from conversations.trajectory import Trajectory
from tools.base import ToolConfigError
from tools.registry import load_tools
from tools.toolset import ToolSet

Messages = Sequence[Mapping[str, Any]]
Prompts = str | Messages | Sequence[str | Messages]


@dataclass(frozen=True, slots=True)
class Generations:
    """One entry a sample: the n samples of the first prompt, then those of the second, and so on.

    `completions`: the text of the last turn, call blocks included. `token_ids`: every token after
    the prompt. `metadata`: `prompt_ids`, `response_ids`, `response_mask`, `response_logprobs`,
    `stop_reason`, `num_turns`, `reward`, `messages`, `error`, and the whole `trajectory`.
    """

    completions: list[str]
    token_ids: list[list[int]]
    metadata: list[dict[str, Any]]


class InferenceEngine:
    """A model, its tools and its limits, started from a config file (None: the embedded default).

    `tools` is a tools.yaml, the name of a shipped config, or a list of Python functions and tool
    objects; None: the config's `multi_turn.tool_config_path`. Without `multi_turn.enable` there are
    no tools and one turn.
    """

    def __init__(
        self,
        config: str | Path | Config | None = None,
        *,
        tools: str | Path | ToolSet | Iterable[Callable[..., Any]] | None = None,
        overrides: Sequence[str] = (),
        log_path: Path | None = None,
    ) -> None:
        self.config = config if isinstance(config, Config) else load_config(config, overrides)
        parts = prepare(self.config, tool_set(self.config, tools), config_interactions(self.config))
        self._session = Session(parts, log_path=log_path)

    def generate(
        self,
        prompts: Prompts,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        validate: bool = False,
    ) -> Generations:
        """Runs every prompt to its end.

        A prompt is a text or a list of messages; `prompts` is one or a list of them.

        For this call only: `temperature`, `top_p`, `top_k` (-1: off), `max_tokens` (of one turn),
        `n` (samples of each prompt), `validate` (start from `val_kwargs`). None: as the config
        says. The call blocks; use `generate_async` in async code. Raises TaskError for what is not
        a prompt, ConfigError for an option out of range. A generation that fails raises nothing:
        see its `stop_reason` and `error`.
        """
        options = _options(
            temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, n=n
        )
        return self._session.run(self._generate(_tasks(prompts), options, validate))

    async def generate_async(
        self,
        prompts: Prompts,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        validate: bool = False,
    ) -> Generations:
        """`generate` for async code: the caller's event loop is not blocked.

        Cancelling it cancels the conversations.
        """
        options = _options(
            temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, n=n
        )
        return await self._session.arun(self._generate(_tasks(prompts), options, validate))

    async def _generate(self, tasks: list[Task], options: _Options, validate: bool) -> Generations:
        sampling = {
            **self.config.sampling(validate),
            **options.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True),
        }
        finished: dict[tuple[str, int], Trajectory] = {}
        await run_tasks(
            tasks,
            self._session.runtime_with(sampling, options.max_tokens),
            n=options.n or self.config.n(validate),
            max_concurrent=self.config.rollout.max_num_seqs,
            on_done=lambda trajectory: finished.__setitem__(
                (trajectory.task_id, trajectory.sample), trajectory
            ),
        )
        position = {task.id: index for index, task in enumerate(tasks)}
        return _generations(
            finished[key] for key in sorted(finished, key=lambda key: (position[key[0]], key[1]))
        )

    def close(self) -> None:
        """Stops the engine, its tools and their backends. Safe to call twice."""
        self._session.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def tool_set(
    config: Config, tools: str | Path | ToolSet | Iterable[Callable[..., Any]] | None
) -> ToolSet | None:
    """The tools to offer: those given, else the config's, else None.

    Raises ToolConfigError or ConfigError.
    """
    chosen = tools if tools is not None else config.tool_config_path
    if tools is not None and not config.rollout.multi_turn.enable:
        raise ConfigError(
            "tools are given, but rollout.multi_turn.enable is false: one turn cannot use them; "
            "set it to true"
        )
    if chosen is None or isinstance(chosen, ToolSet):
        return chosen
    if isinstance(chosen, (str, Path)):
        return load_tools(chosen)
    if not isinstance(chosen, Iterable):
        raise ToolConfigError(
            f"tools is a list of functions and tools, or a config's name, got {chosen!r:.80}; "
            "write tools=[...]"
        )
    return ToolSet.from_tools(chosen)


class _Options(Section):
    """The options of `generate`, in the ranges of config.yaml."""

    temperature: Temperature | None
    top_p: Share | None
    top_k: TopK | None
    max_tokens: PositiveInt | None
    n: PositiveInt | None


def _options(**given: Any) -> _Options:
    try:
        return _Options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"generate: {first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from None


def _tasks(prompts: Prompts) -> list[Task]:
    """One task a prompt; their ids are the prompts' positions."""
    if not isinstance(prompts, Sequence):
        raise TaskError(
            "a prompt is a text or a list of messages, and several prompts are a list; "
            f"got {type(prompts).__name__}"
        )
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    many: Sequence[Any] = [prompts] if alone else prompts
    tasks = []
    for index, prompt in enumerate(many):
        if isinstance(prompt, str) and not prompt.strip():
            raise TaskError(f"prompt {index} is empty")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            images = GivenImages()
            given = given_messages(messages, images)
            tasks.append(Task(str(index), given, images=tuple(images.sources)))
        except MessageError as error:
            raise TaskError(f"prompt {index}: {error}") from error
    return tasks


def _generations(trajectories: Iterable[Trajectory]) -> Generations:
    result = Generations([], [], [])
    for trajectory in trajectories:
        place = last_sampled(trajectory.messages)
        result.completions.append(trajectory.messages[place]["raw"] if place >= 0 else "")
        result.token_ids.append(trajectory.response_ids)
        result.metadata.append(_metadata(trajectory))
    return result


def _metadata(trajectory: Trajectory) -> dict[str, Any]:
    names = (
        "prompt_ids",
        "response_ids",
        "response_mask",
        "response_logprobs",
        "stop_reason",
        "num_turns",
        "reward",
        "messages",
        "error",
    )
    return {**{name: getattr(trajectory, name) for name in names}, "trajectory": trajectory}
