"""The embedded model on the GPU: hermes calls that it really makes, tools that really run, records that verify."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.batch import Progress, run_tasks
from agent.config import Config
from agent.engines.engine import Engine
from agent.engines.sglang import start
from agent.session import Session
from agent.tasks import read_tasks
from conversations.store import RunFolder, read_trajectories
from tests.bench.gpu.logprobs import differences
from tests.bench.gpu.machine import Gpu, measured
from tools.registry import load_tools

if TYPE_CHECKING:
    from agent.rollout import AgentRollout


class RealRun:
    """One session of the product's own on the config; `rollout` is its engine's."""

    def __init__(self, config: Config, tools: str, log: Path) -> None:
        self._rollouts: list[AgentRollout] = []
        self._config = config
        self.session = Session(config, load_tools(tools), log_path=log, start=functools.partial(self._start, log))

    def _start(self, log: Path) -> Engine:
        self._rollouts.append(start(self._config.verl_rollout(), self._config.model_dir(), log_path=log))
        return self._rollouts[0].engine()

    def run(self, task_file: Path, limit: int, folder: Path, gpu: Gpu) -> dict[str, Any]:
        """What came of `limit` tasks."""
        progress = Progress()
        with RunFolder.create(folder, {}) as store, measured(gpu) as usage:
            self.session.run(
                run_tasks(
                    read_tasks(task_file, limit),
                    self.session.runtime,
                    max_concurrent=self._config.rollout.max_num_seqs,
                    store=store,
                    progress=progress,
                )
            )
        trajectories = list(read_trajectories(folder))
        turns = [turn for one in trajectories for turn in one.turns]
        return {
            "conversations": progress.done,
            "turns": progress.turns,
            "sampled_tokens_per_s": round(progress.sampled_tokens / usage.wall_s),
            "wall_s": round(usage.wall_s, 2),
            "cpu_s": round(usage.cpu_s, 2),
            "gpu_busy": usage.gpu_busy,
            "calls": dict(Counter(f"{call.name} {call.status}" for one in trajectories for call in one.tool_calls)),
            "ended": dict(progress.stop_reasons),
            "infra_errors": progress.infra_errors,
            "mean_reward": progress.mean_reward,
            "cached_share": round(
                sum(turn.cached_tokens or 0 for turn in turns) / max(1, sum(turn.prompt_tokens or 0 for turn in turns)), 3
            ),
        }

    def logprobs(self, task_file: Path, count: int) -> dict[str, Any]:
        """See `logprobs.differences`, over the tasks' prompts."""
        template = self.session.template
        schemas = self.session.tools.schemas if self.session.tools else []
        prompts = [[token for _, ids in template.prompt(task.messages, schemas) for token in ids] for task in read_tasks(task_file, count)]
        return self.session.run(differences(self._rollouts[0], prompts))
