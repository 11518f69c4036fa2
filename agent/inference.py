"""`InferenceEngine("config.yaml").generate(prompts)`: the loop as a library, from sync and async code alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.batch import run_tasks
from agent.config import Config, load_config
from agent.errors import ConfigError, TaskError
from agent.session import Session
from agent.tasks import Task
from conversations.errors import MessageError
from conversations.messages import given_messages
from conversations.trajectory import Trajectory
from tools.registry import load_tools
from tools.toolset import ToolSet

Messages = Sequence[Mapping[str, Any]]
Prompts = str | Messages | Sequence[str | Messages]


@dataclass(frozen=True, slots=True)
class Generations:
    """One entry a sample, prompt-major: the n samples of the first prompt, then those of the second.

    `completions` are the last turn's text, call blocks included, `token_ids` the response's ids (every token after the prompt),
    `metadata` the rest: `response_ids`, `response_mask`, `response_logprobs`, `stop_reason`, `reward`, `messages`, and
    the whole `trajectory`.
    """

    completions: list[str]
    token_ids: list[list[int]]
    metadata: list[dict[str, Any]]


class InferenceEngine:
    """A model, its tools and its limits, started from a config file (None: the embedded default).

    `tools` may be a tools.yaml, a shipped config's name, or Python functions and tool objects; without it the config's
    `multi_turn.tool_config_path` counts. Without `multi_turn.enable` there are no tools and one turn.
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
        self._session = Session(self.config, tool_set(self.config, tools), log_path=log_path)

    def generate(self, prompts: Prompts, **options: Any) -> Generations:
        """Runs every prompt to its end: a text, a list of messages, or a list of either.

        Options, each for this call alone: `temperature`, `top_p`, `top_k`, `max_tokens` (of one turn), `n` (samples of
        each prompt), `validate` (use `val_kwargs`). Blocks; use `generate_async` where an event loop runs.
        Raises TaskError for what is not a prompt. A failed generation is data: see `stop_reason` and `error`.
        """
        return self._session.run(self._generate(_tasks(prompts), **options))

    async def generate_async(self, prompts: Prompts, **options: Any) -> Generations:
        """`generate` for async code: the caller's event loop goes on meanwhile."""
        return await self._session.arun(self._generate(_tasks(prompts), **options))

    async def _generate(
        self,
        tasks: list[Task],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        validate: bool = False,
    ) -> Generations:
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        sampling = {**self.config.sampling(validate), **{key: value for key, value in given.items() if value is not None}}
        finished: dict[tuple[str, int], Trajectory] = {}
        await run_tasks(
            tasks,
            self._session.runtime_with(sampling, max_tokens),
            n=n or self.config.n(validate),
            max_concurrent=self.config.rollout.max_num_seqs,
            on_done=lambda trajectory: finished.__setitem__((trajectory.task_id, trajectory.sample), trajectory),
        )
        position = {task.id: index for index, task in enumerate(tasks)}
        return _generations(finished[key] for key in sorted(finished, key=lambda key: (position[key[0]], key[1])))

    def close(self) -> None:
        """Ends the engine, its tools and their backends. Safe to call twice."""
        self._session.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def tool_set(config: Config, tools: str | Path | ToolSet | Iterable[Callable[..., Any]] | None) -> ToolSet | None:
    """The tools to offer: the ones given, else the config's, else none. Raises ToolConfigError or ConfigError."""
    chosen = tools if tools is not None else config.tool_config_path
    if tools is not None and not config.rollout.multi_turn.enable:
        raise ConfigError("tools are given, but rollout.multi_turn.enable is false: one turn cannot use them; set it to true")
    if chosen is None or isinstance(chosen, ToolSet):
        return chosen
    if isinstance(chosen, (str, Path)):
        return load_tools(chosen)
    return ToolSet.from_tools(chosen)


def _tasks(prompts: Prompts) -> list[Task]:
    """One task a prompt; their ids are the prompts' positions."""
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    many: Sequence[Any] = [prompts] if alone else prompts
    tasks = []
    for index, prompt in enumerate(many):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            tasks.append(Task(str(index), given_messages(messages)))
        except MessageError as error:
            raise TaskError(f"prompt {index}: {error}") from error
    return tasks


def _generations(trajectories: Iterable[Trajectory]) -> Generations:
    result = Generations([], [], [])
    for trajectory in trajectories:
        last = next((message for message in reversed(trajectory.messages) if message.get("raw") is not None), None)
        result.completions.append(last["raw"] if last else "")
        result.token_ids.append(trajectory.response_ids)
        result.metadata.append(_metadata(trajectory))
    return result


def _metadata(trajectory: Trajectory) -> dict[str, Any]:
    names = ("prompt_ids", "response_ids", "response_mask", "response_logprobs", "stop_reason", "num_turns", "reward", "messages", "error")
    return {**{name: getattr(trajectory, name) for name in names}, "trajectory": trajectory}
