"""What goes between a run and its workers: tasks there, records back, as JSON bytes.

Invariant: no object of ours is in a task or in a record: what tools and models wrote is never
pickled as anything but bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from agent.config.config import Config
from agent.engines.engine import Engine
from agent.loop.conversation import SentFiles
from agent.loop.tasks import Task
from agent.runs.parts import start_engine
from agent.workers.programs import Programs
from conversations.images.sources import ImageSource, image_source
from conversations.trajectory import Trajectory
from conversations.upgrade import upgraded

StartEngine = Callable[[Config, Path | None], Engine]
"""Starts a worker's engine from its config; the path is where its processes write."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker makes its session from.

    Tools and interactions are read from the config's paths. `folders` are the run's `sys.path`,
    `variables` go into the worker's environment. `log_folder` is the run folder: the engine's
    processes write there, if the worker's machine has it. With `programs` the worker runs agent
    programs.
    """

    config: Config
    index: int
    validate: bool
    working_folder: Path
    folders: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    log_folder: Path | None = None
    start: StartEngine = start_engine
    programs: Programs | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A conversation for a worker. `before` is the record that it continues."""

    task: Task
    sample: int
    before: Trajectory | None = None


def encode_work(work: Work) -> bytes:
    """The work as JSON bytes."""
    task = {item.name: getattr(work.task, item.name) for item in fields(Task)}
    task["images"] = [_image_json(image) for image in work.task.images]
    before = work.before.to_line() if work.before else None
    return json.dumps([task, work.sample, before]).encode()


def decode_work(data: bytes) -> Work:
    """The work that `encode_work` wrote."""
    task, sample, before = json.loads(data)
    images = tuple(image_source(image) for image in task.pop("images"))
    return Work(
        Task(**task, images=images), sample, Trajectory.from_line(before) if before else None
    )


def _image_json(image: ImageSource) -> Any:
    """The source as `image_source` reads it; a file is read by the worker, at the same path."""
    if image.path is not None:
        return {"path": str(image.path.absolute())}
    if image.data is not None:
        return f"data:;base64,{base64.b64encode(image.data).decode()}"
    return image.url if image.url is not None else f"sha256:{image.sha256}"


class Kind(StrEnum):
    """What an answer holds: a record's line, or one line about what went wrong."""

    RECORD = "record"
    CUT = "cut"
    """The record of a conversation that was cut off."""
    LOST = "lost"
    """There is no record: not even the bare one has a JSON form."""
    REFUSED = "refused"
    """The task, or the command, cannot be run: a user's mistake that ends the run."""
    BROKEN = "broken"
    """The worker's own code failed, which ends the run."""


Answer = tuple[int, str, bytes, bytes | None, tuple[bytes, ...], SentFiles]
"""(number of the work, Kind, UTF-8, content of the evidence file, images as PNG, files of an agent
program). Builtin types only.
"""


@dataclass(frozen=True, slots=True)
class SentRecord(Trajectory):
    """A record as a worker wrote it. `line` is what stands on disk; the fields are for counting."""

    line: str = ""

    def to_line(self) -> str:
        """The line as it came: to make it again would cost the run's process most of its time."""
        return self.line


def sent_record(line: str) -> Trajectory:
    """The record of a worker's line. Its hash is the worker's own and is not checked here."""
    try:
        record = orjson.loads(line)
    except ValueError:  # it refuses lone surrogates
        record = json.loads(line)
    read = Trajectory.from_record(upgraded(record))
    return SentRecord(**{item.name: getattr(read, item.name) for item in fields(read)}, line=line)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a worker has finished since it was asked last, and how far its live conversations are.

    `turns` and `tokens` are those of live conversations, `tokens_in_flight` of turns that are not
    complete.
    """

    answers: list[Answer]
    turns: int
    tokens: int
    tokens_in_flight: int


def started(**facts: Any) -> bytes:
    """A worker's answer to `start`."""
    return json.dumps(facts).encode()
