"""Run folders of a trainer: one for each batch, or one for each step where a worker sees no end of
a step.

Invariants. Each folder has one writer, although others make folders beside it. A record of
`StepFolders` stands in the folder of the weights that sampled its last token. At most `MAX_OPEN`
are open; a record for one that has been closed (a straggler of an asynchronous trainer) opens
another beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import ConfigError
from conversations.errors import RunFolderError
from conversations.run.hash_store import HashStore
from conversations.run.store import RunFolder
from conversations.trajectory import Trajectory

MAX_OPEN = 4


class NewFolders:
    """Makes run folders under `root`.

    The tokenizer is saved in the first one and copied from there: saving a large one takes most of
    a second.
    """

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self._root = root
        self._tokenizer = tokenizer
        self._saved: Path | None = None

    def create(self, name: str, manifest: Mapping[str, Any]) -> RunFolder:
        """Makes the folder `name`, or `name-1` and so on if that exists.

        Raises ConfigError if it cannot be written.
        """
        try:
            path = self._claimed(name)
            if self._saved and self._saved.is_dir():
                shutil.copytree(self._saved, path / "tokenizer")
            else:
                self._tokenizer.save_pretrained(path / "tokenizer")
        except OSError as error:
            raise ConfigError(
                f"save_to: nothing can be written to {self._root}: {error.strerror or error}"
            ) from error
        self._saved = path / "tokenizer"
        return RunFolder.create(path, manifest)

    def _claimed(self, name: str) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        path, again = self._root / name, 0
        while True:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            again += 1
            path = self._root / f"{name}-{again}"


@dataclass(slots=True)
class _Open:
    folder: RunFolder
    samples: Counter[str] = field(default_factory=Counter)

    def add(self, append: Callable[[Trajectory], object], trajectory: Trajectory) -> None:
        task_id, sample = trajectory.task_id, self.samples[trajectory.task_id]
        append(dataclasses.replace(trajectory, id=f"{task_id}-{sample}", sample=sample))
        self.samples[task_id] += 1


class StepFolders:
    """The folders `step-STEP-HOST-PID` under `root`.

    STEP is the weights' step that the engine reports, `none` if it reports none. `manifest` makes
    the run.json of a step.
    """

    def __init__(
        self, root: Path, manifest: Callable[[str], dict[str, Any]], tokenizer: Any
    ) -> None:
        # Nothing is run again: see `agent.loop.batch.Store`.
        self.done: set[tuple[str, int]] = set()
        self._new = NewFolders(root, tokenizer)
        self._manifest = manifest
        self._worker = f"{socket.gethostname()}-{os.getpid()}"
        self._open: dict[str, _Open] = {}
        self._step = "none"

    def keep_evidence(self, data: bytes) -> None:
        """Never called: a trainer's client gives no evidence."""
        raise RunFolderError("a trainer's run has no place for evidence")

    def append(self, trajectory: Trajectory) -> None:
        """Writes a conversation that has ended as the next sample of its task."""
        place = self._place(trajectory)
        place.add(place.folder.append, trajectory)

    def image_store(self, trajectory: Trajectory) -> HashStore:
        """Where the conversation's images are kept."""
        return self._place(trajectory).folder.image_store(trajectory)

    def append_unfinished(self, trajectory: Trajectory) -> None:
        """Writes what there is of a conversation that was cut off."""
        place = self._place(trajectory)
        place.add(place.folder.append_unfinished, trajectory)

    def close(self) -> None:
        """Closes the open folders. Safe to call twice."""
        while self._open:
            self._close_oldest()

    def _place(self, trajectory: Trajectory) -> _Open:
        if trajectory.turns:
            self._step = (trajectory.turns[-1].weight_version or "none").rpartition("-")[2]
        if self._step not in self._open:
            if len(self._open) == MAX_OPEN:
                self._close_oldest()
            self._open[self._step] = _Open(
                self._new.create(f"step-{self._step}-{self._worker}", self._manifest(self._step))
            )
        return self._open[self._step]

    def _close_oldest(self) -> None:
        self._open.pop(next(iter(self._open))).folder.close()
