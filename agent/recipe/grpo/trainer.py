"""Starts verl's trainer as a process of its own, and starts it again where a run was cut off.

verl goes on from its last checkpoint. Step folders of weights from that checkpoint on belong to the
part that is done again: they move to `superseded/` before the trainer starts. The trainer ends with
this process, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import yaml

from agent.errors import ConfigError, TaskError
from agent.recipe.grpo.report import read_metrics
from agent.recipe.grpo.rows import split, write_verl_rows
from agent.recipe.grpo.settings import (
    GrpoSettings,
    Layout,
    agent_loop_yaml,
    overrides,
    tools_yaml,
)
from agent.recipe.own_folder import check_same, check_unused
from agent.runs.ending import sigterm_as_interrupt
from conversations.run.whole_file import write_whole

_STEP = re.compile(r"step-(\d+)-")
_STOP_S = 20.0
_PR_SET_PDEATHSIG = 1


def check_installed() -> None:
    """Raises ConfigError if verl 0.9 is not installed."""
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith("0.9."):
        raise ConfigError(
            f"verl 0.9.1 is needed, found {found}; agent/recipe/README.md says how to install it"
        )


def lay_out(settings: GrpoSettings, layout: Layout, gsm8k: Path, model: Path) -> None:
    """Writes the data and verl's files, or checks that the folder holds a run of these settings.

    Raises ConfigError naming the settings that differ, or if the folder holds something else;
    TaskError for data of another form, or too few rows. Then nothing is written.
    """
    rows = split(gsm8k, settings.held_out)
    if len(rows.train) < settings.prompts:
        raise TaskError(
            f"{gsm8k} has {len(rows.train)} rows to train on, a step needs {settings.prompts}"
        )
    wanted = json.loads(json.dumps(asdict(settings)))
    wanted["model"] = str(model)
    wanted["data_sha256"] = hashlib.sha256(gsm8k.read_bytes()).hexdigest()
    if layout.settings.is_file():
        check_same(layout.root, layout.kept_settings(), wanted)
        return
    written = (layout.train.parent, layout.tools, layout.agent_loop)
    check_unused(layout.root, {*(one.name for one in written), f"{layout.settings.name}.new"})
    layout.root.mkdir(parents=True, exist_ok=True)
    write_verl_rows(rows.train, layout.train)
    write_verl_rows(rows.held_out, layout.held_out)
    layout.tools.write_text(yaml.safe_dump(tools_yaml(settings), sort_keys=False), encoding="utf-8")
    layout.agent_loop.write_text(
        yaml.safe_dump(agent_loop_yaml(settings, layout), sort_keys=False), encoding="utf-8"
    )
    write_whole(layout.settings, [(json.dumps(wanted, indent=2) + "\n").encode()])


def is_done(settings: GrpoSettings, layout: Layout) -> bool:
    """Whether the last step is done and its weights have answered the held-out problems."""
    last = read_metrics(layout).get(settings.steps, {})
    answered = any(name.startswith("val-") for name in last)
    return answered and latest_checkpoint(layout) >= settings.steps


def run_trainer(
    settings: GrpoSettings,
    layout: Layout,
    model: Path,
    extra: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs the trainer to its end; returns its exit code. Its output goes to `trainer.log`.

    Ctrl-C and SIGTERM stop the trainer and all that it started, and raise KeyboardInterrupt. If
    this process is killed, the trainer is, too. Call it on the main thread.
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
    log = (layout.root / "trainer.log").open("ab")
    with sigterm_as_interrupt(), _locked(layout) as lock, log:
        set_aside(layout)
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            preexec_fn=_end_with(os.getpid()),
        )
        try:
            return process.wait()
        finally:
            _stop(process)


def _locked(layout: Layout) -> IO[str]:
    """A lock that the trainer inherits: nobody starts another until it is gone.

    Raises ConfigError if a trainer has it.
    """
    lock = (layout.root / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(f"a trainer is still running in {layout.root}; end it first") from error
    return lock


def latest_checkpoint(layout: Layout) -> int:
    """The step of the checkpoint that verl will go on from; 0 if there is none.

    verl names it in a file that it does not write whole, and looks at nothing else: a file that
    names no whole checkpoint is replaced by one that does, or removed.
    """
    named = layout.checkpoints / "latest_checkpointed_iteration.txt"
    text = named.read_text(encoding="utf-8").strip() if named.is_file() else "0"
    whole = {0, *_whole_checkpoints(layout)}
    if text.isdecimal() and int(text) in whole:
        return int(text)
    if latest := max(whole):
        write_whole(named, [str(latest).encode()])
    else:
        named.unlink()
    return latest


def _whole_checkpoints(layout: Layout) -> Iterator[int]:
    """Steps whose checkpoints hold the actor's three parts, and verl's last file."""
    for folder in layout.checkpoints.glob("global_step_*"):
        parts = ("data.pt", *(f"actor/{part}_*.pt" for part in ("model", "optim", "extra_state")))
        if all(any(folder.glob(part)) for part in parts):
            yield int(folder.name.rpartition("_")[2])


def set_aside(layout: Layout) -> None:
    """Moves the folders of steps that the trainer will do again."""
    first = latest_checkpoint(layout)
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


def _end_with(parent: int) -> Callable[[], None]:
    """Run in a child before its program: the kernel kills it when its parent `parent` dies."""
    prctl = ctypes.CDLL(None).prctl

    def end_with() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os.kill(os.getpid(), signal.SIGKILL)

    return end_with


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the trainer's processes: first politely, then for sure."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
