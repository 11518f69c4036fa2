"""Starts verl's trainer as a process of its own, and starts it again where a run was cut off.

verl goes on from its last checkpoint. Step folders of weights from that checkpoint on belong to the
part that is done again: they move to `superseded/` before the trainer starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import yaml

from agent.errors import ConfigError
from agent.recipe.grpo.rows import split, write_verl_rows
from agent.recipe.grpo.settings import (
    GrpoSettings,
    Layout,
    agent_loop_yaml,
    overrides,
    tools_yaml,
)

_STEP = re.compile(r"step-(\d+)-")
_STOP_S = 20.0


def lay_out(settings: GrpoSettings, layout: Layout, gsm8k: Path) -> None:
    """Writes the data and verl's files, or checks that the folder holds a run of these settings.

    Raises ConfigError naming the settings that differ, TaskError for data of another form.
    """
    wanted = json.loads(json.dumps(asdict(settings)))
    if layout.settings.is_file():
        _check_same(json.loads(layout.settings.read_text(encoding="utf-8")), wanted, layout)
        return
    rows = split(gsm8k, settings.held_out)
    write_verl_rows(rows.train, layout.train)
    write_verl_rows(rows.held_out, layout.held_out)
    layout.tools.write_text(yaml.safe_dump(tools_yaml(settings), sort_keys=False), encoding="utf-8")
    layout.agent_loop.write_text(
        yaml.safe_dump(agent_loop_yaml(settings, layout), sort_keys=False), encoding="utf-8"
    )
    layout.settings.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def run_trainer(
    settings: GrpoSettings,
    layout: Layout,
    model: Path,
    extra: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs the trainer to its end; returns its exit code. Its output goes to `trainer.log`.

    Ctrl-C stops the trainer and all that it started.
    """
    started = len(layout.metrics())
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *overrides(settings, layout, model),
        f"hydra.run.dir='{layout.root}/hydra'",
        *extra,
    ]
    variables = {
        **os.environ,
        "VERL_FILE_LOGGER_PATH": str(layout.root / f"metrics-{started}.jsonl"),
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "true",
        **(env or {}),
    }
    with _locked(layout) as lock, (layout.root / "trainer.log").open("ab") as log:
        set_aside(layout)
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
        try:
            return process.wait()
        finally:
            _stop(process)


def _locked(layout: Layout) -> IO[str]:
    """A lock that the trainer inherits: it outlives this process if that is killed.

    Raises ConfigError if a trainer has it.
    """
    lock = (layout.root / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(f"a trainer is still running in {layout.root}; end it first") from error
    return lock


def _check_same(before: Mapping[str, object], wanted: Mapping[str, object], layout: Layout) -> None:
    differing = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
    if differing:
        said = ", ".join(
            f"{name} {before.get(name)} (now {wanted.get(name)})" for name in differing
        )
        raise ConfigError(
            f"{layout.root} holds a run with other settings: {said}; "
            "give the same, or another --out"
        )


def set_aside(layout: Layout) -> None:
    """Moves the folders of steps that the trainer will do again."""
    latest = layout.checkpoints / "latest_checkpointed_iteration.txt"
    first = int(latest.read_text(encoding="utf-8")) if latest.is_file() else 0
    superseded = layout.root / "superseded"
    for folder in sorted(layout.steps.glob("step-*")):
        found = _STEP.match(folder.name)
        if found and int(found.group(1)) >= first:
            superseded.mkdir(exist_ok=True)
            target, again = superseded / folder.name, 0
            while target.exists():
                again += 1
                target = superseded / f"{folder.name}-again-{again}"
            shutil.move(folder, target)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the trainer's processes: first politely, then for sure."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
