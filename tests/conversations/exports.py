"""The run that the tests of exports share, and an export of it; made once a process."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from conversations.export import job
from conversations.export.export import Export
from conversations.run.open_run import Run, open_run
from tests.conversations.synthetic import make_run
from tests.helpers import fresh_tokenizer, npm_models

TRAJECTORIES = 60


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="turntrace-exports-")


@functools.cache
def small_run() -> Run:
    """60 trajectories in groups of 4: calls that work and fail, malformed ones, thoughts, cuts,
    infrastructure failures."""
    return open_run(make_run(Path(_scratch().name) / "run", TRAJECTORIES, distinct=TRAJECTORIES))


@functools.cache
def qwen3_run() -> Run:
    """24 trajectories with Qwen3's template, which drops thoughts of earlier turns and puts an
    empty one into the last."""
    limits = ("rollout.prompt_length=2048", "rollout.max_model_len=4096")
    tokenizer = fresh_tokenizer(npm_models("qwen3"))
    return open_run(
        make_run(
            Path(_scratch().name) / "qwen3", 24, distinct=24, tokenizer=tokenizer, overrides=limits
        )
    )


@functools.cache
def exported(to: str, run: Run | None = None) -> tuple[Path, Export]:
    """The folder that an export of a run, else of `small_run`, wrote, and what it said."""
    out = Path(tempfile.mkdtemp(dir=_scratch().name)) / to
    return out, job.export_run(run or small_run(), to, out)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines export."""
    return [
        json.loads(line)
        for line in (folder / "train.jsonl").read_text(encoding="ascii").splitlines()
    ]
