"""Examines an adapter: whole conversations through the runtime, on the real engine, with the real
tools.

One engine is started for each model, and all of its conditions run on it one after the other. What
is finished stays: the report is written after each condition, and Ctrl-C ends the examination with
the rows there are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.config.config import Config, load_config
from agent.loop.batch import Progress, run_tasks
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from agent.model.base import BASE_NAME, model_dir
from agent.recipe import data, heldout, report
from agent.recipe.report import ADAPTER, BASE, GENERATED, GSM8K, RECOVERY, Condition, Row
from agent.runs.manifest import versions
from agent.runs.parts import config_tools, make_dispatcher, prepare
from agent.runs.progress import Display, say
from agent.runs.session import Session
from conversations.trajectory import Trajectory
from tools.toolset import ToolSet

CONDITIONS = (
    *(
        Condition(ADAPTER, problems, 0.0, reverse)
        for problems in (GENERATED, GSM8K)
        for reverse in (False, True)
    ),
    Condition(ADAPTER, RECOVERY, 0.0),
    *(
        Condition(ADAPTER, problems, 1.0, reverse)
        for problems in (GENERATED, GSM8K)
        for reverse in (False, True)
    ),
    Condition(ADAPTER, RECOVERY, 1.0),
    *(Condition(BASE, problems, 0.0) for problems in (GENERATED, GSM8K)),
)

_BASE_LIMITS = ("rollout.multi_turn.max_assistant_turns=4", "rollout.turntrace.max_tokens=256")
"""The base model makes no calls and knows no end: what it may waste on that."""


@dataclass(slots=True)
class Examination:
    """What to examine, on which problems, and what was found so far."""

    adapter: Path
    gsm8k: Path
    out: Path
    limit: int
    console: Console
    rows: list[Row] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def run(self) -> list[Row]:
        """Runs every condition and writes `report.json` into `out`; returns the rows. Ctrl-C leaves
        the finished ones.

        Raises ConfigError, TaskError and the errors of an engine's start.
        """
        tasks = {
            GENERATED: heldout.generated_tasks(self.limit),
            GSM8K: heldout.gsm8k_tasks(self.gsm8k, self.limit),
        }
        self.seen = heldout.trained_on(tasks[GENERATED], data.FULL.generated)
        say(
            self.console,
            f"{len(self.seen)} of {len(tasks[GENERATED])} generated questions stand word for word "
            "in the training data",
        )
        try:
            self._examine(ADAPTER, str(model_dir(self.adapter)), (), tasks)
            self._examine(BASE, BASE_NAME, _BASE_LIMITS, tasks)
        except KeyboardInterrupt:
            say(
                self.console,
                f"interrupted: {len(self.rows)} of {len(CONDITIONS)} conditions were examined, "
                "the last one perhaps in part",
            )
        return self.rows

    def _examine(
        self, model: str, path: str, limits: tuple[str, ...], tasks: dict[str, list[Task]]
    ) -> None:
        log = self.out / f"engine-{model}.log"
        say(self.console, f"starting the engine with the {model} model (log: {log})")
        config = _config(path, limits)
        with Session(prepare(config, config_tools(config)), log_path=log) as session:
            if model == ADAPTER and session.runtime.dispatcher:
                tasks = {
                    **tasks,
                    RECOVERY: session.run(
                        heldout.recovery_tasks(session.runtime.dispatcher, self.limit)
                    ),
                }
            for condition in CONDITIONS:
                if condition.model == model:
                    self._condition(session, condition, tasks[condition.problems])

    def _condition(self, session: Session, condition: Condition, tasks: list[Task]) -> None:
        """One condition's row; if Ctrl-C ends it, of the conversations that had finished."""
        say(self.console, str(condition))
        found: list[Trajectory] = []
        progress = Progress(total=len(tasks))
        running = run_tasks(
            tasks,
            runtime_for(session, condition),
            max_concurrent=session.parts.config.rollout.max_num_seqs,
            progress=progress,
            on_done=found.append,
        )
        with Display(progress, self.console, session.engine) as display:
            try:
                session.run(running, poll=display.refresh)
            finally:
                self.rows.append(
                    report.row(condition, len(tasks), found, self.seen, display.wall_s)
                )
                report.write_report(self.out / "report.json", self._about(session), self.rows)

    def _about(self, session: Session) -> dict[str, Any]:
        return {
            "adapter": str(self.adapter),
            "gsm8k": str(self.gsm8k),
            "trained_on_word_for_word": sorted(self.seen),
            "engine": session.engine.describe(),
            "versions": versions(),
        }


def _config(model_path: str, limits: tuple[str, ...]) -> Config:
    """The embedded config, which is what `turntrace run` uses without one, with another model."""
    return load_config(
        None, (f"model_path={model_path}", "rollout.multi_turn.tool_config_path=gsm8k", *limits)
    )


def runtime_for(session: Session, condition: Condition) -> Runtime:
    """The session's runtime, sampling and tool order as the condition says."""
    parts = session.parts
    runtime = session.runtime_with(
        {**parts.config.sampling(), "temperature": condition.temperature}
    )
    if not condition.reverse or parts.tools is None:
        return runtime
    tools = ToolSet(reversed(list(parts.tools.values())))
    return dataclasses.replace(
        runtime, dispatcher=make_dispatcher(parts.config, tools, parts.template)
    )
