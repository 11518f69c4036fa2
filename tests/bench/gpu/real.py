"""Part `real`: the embedded model, calls that it really makes, tools that really run; its log-probs
against a prefill's.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands.tasks_work import write_gsm_symbolic
from agent.config.config import Config, load_config
from agent.engines.engine import Engine
from agent.engines.start import start
from agent.loop.batch import Progress, run_tasks
from agent.loop.tasks import read_tasks
from agent.runs.parts import prepare
from agent.runs.session import Session
from conversations.run.store import RunFolder, read_trajectories
from tests.bench.gpu.logprobs import differences
from tests.bench.gpu.machine import Requests, Usage, measured
from tests.bench.gpu.place import Place
from tools.registry import load_tools

if TYPE_CHECKING:
    from agent.rollout import AgentRollout

WIDER = ("rollout.max_num_seqs=256", "rollout.gpu_memory_utilization=0.5")
"""The embedded default is made for a CPU."""


def real(place: Place) -> None:
    options, size = place.options, 4 if place.dry else 512
    tasks = options.tasks or place.folder / "tasks.jsonl"
    if not options.tasks:
        write_gsm_symbolic(tasks, size, 1)
    run = RealRun(
        load_config(None, [*(() if place.dry else WIDER), *options.overrides]),
        "gsm8k",
        options.logs / "engine-real.log",
    )
    with run.session:
        for case in ("first", "second"):
            with place.noting("real", f"gsm8k tools, {case} run") as figures:
                figures |= run.run(tasks, size, place, place.folder / f"run-{case}")
        with place.noting("real", "log-probs, sampling against prefill") as figures:
            figures |= run.logprobs(tasks, min(size, 256))


class RealRun:
    """One session of the product's own on the config; `rollout` is its engine's."""

    def __init__(self, config: Config, tools: str, log: Path) -> None:
        self._rollouts: list[AgentRollout] = []
        self._config = config
        self.session = Session(
            prepare(config, load_tools(tools)),
            log_path=log,
            start=functools.partial(self._start, log),
        )

    def _start(self, log: Path) -> Engine:
        self._rollouts.append(
            start(self._config.verl_rollout(), self._config.model_dir(), log_path=log)
        )
        return self._rollouts[0].engine()

    def run(self, task_file: Path, limit: int, place: Place, folder: Path) -> dict[str, Any]:
        """What came of `limit` tasks."""
        progress = Progress()
        with RunFolder.create(folder, {}) as store:
            usage = self.session.run(self._run(task_file, limit, store, progress, place))
        trajectories = list(read_trajectories(folder))
        turns = [turn for one in trajectories for turn in one.turns]
        return {
            "conversations": progress.done,
            "turns": progress.turns,
            "sampled_tokens_per_s": round(progress.sampled_tokens / usage.wall_s),
            "wall_s": round(usage.wall_s, 2),
            "loop_ms_per_turn": round(1e3 * usage.loop_cpu_s / max(1, progress.turns), 3),
            "gpu_busy": usage.gpu_busy,
            "calls": dict(
                Counter(
                    f"{call.name} {call.status}" for one in trajectories for call in one.tool_calls
                )
            ),
            "ended": dict(progress.stop_reasons),
            "infra_errors": progress.infra_errors,
            "mean_reward": progress.mean_reward,
            "cached_share": round(
                sum(turn.cached_tokens or 0 for turn in turns)
                / max(1, sum(turn.prompt_tokens or 0 for turn in turns)),
                3,
            ),
        }

    async def _run(
        self, task_file: Path, limit: int, store: RunFolder, progress: Progress, place: Place
    ) -> Usage:
        seats = self._config.rollout.max_num_seqs
        with measured(place.gpu, Requests(), asyncio.get_running_loop()) as usage:
            await run_tasks(
                read_tasks(task_file, limit),
                self.session.runtime,
                max_concurrent=seats,
                store=store,
                progress=progress,
            )
        return usage

    def logprobs(self, task_file: Path, count: int) -> dict[str, Any]:
        """See `logprobs.differences`, over the tasks' prompts."""
        template = self.session.parts.template
        schemas = self.session.parts.tools.schemas if self.session.parts.tools else []
        prompts = [
            [token for _, ids in template.prompt(task.messages, schemas) for token in ids]
            for task in read_tasks(task_file, count)
        ]
        return self.session.run(differences(self._rollouts[0], prompts))
