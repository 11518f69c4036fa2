"""Run folders of a trainer's worker that is given one conversation at a time, and is never told where a step ends.

Invariant: a record stands in the folder of the weights that sampled its last turn. At most `MAX_OPEN` folders are open;
a record for one that was closed since (a straggler of an asynchronous trainer) opens another beside it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.store import RunFolder
from conversations.trajectory import Trajectory

MAX_OPEN = 4


@dataclass(slots=True)
class _Open:
    folder: RunFolder
    samples: Counter[str] = field(default_factory=Counter)

    def add(self, append: Callable[[Trajectory], None], trajectory: Trajectory) -> None:
        task_id, sample = trajectory.task_id, self.samples[trajectory.task_id]
        append(dataclasses.replace(trajectory, id=f"{task_id}-{sample}", sample=sample))
        self.samples[task_id] += 1


class StepFolders:
    """`step-STEP-HOST-PID` under `root`; STEP is the weights' that the engine tells, `none` where it tells none.

    `manifest` makes the run.json of a step. `tokenizer` is saved once, and copied into each folder.
    """

    def __init__(self, root: Path, manifest: Callable[[str], dict[str, Any]], tokenizer: Any) -> None:
        self.done: set[tuple[str, int]] = set()  # nothing is run again: see `agent.batch.Store`
        self._root = root
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._worker = f"{socket.gethostname()}-{os.getpid()}"
        self._open: dict[str, _Open] = {}
        self._step = "none"

    def append(self, trajectory: Trajectory) -> None:
        """Writes a finished conversation as the next sample of its task."""
        place = self._place(trajectory)
        place.add(place.folder.append, trajectory)

    def append_unfinished(self, trajectory: Trajectory) -> None:
        """Writes what there is of a conversation that was cut off."""
        place = self._place(trajectory)
        place.add(place.folder.append_unfinished, trajectory)

    def close(self) -> None:
        """Closes what is open. Safe to call twice."""
        while self._open:
            self._close_oldest()

    def _place(self, trajectory: Trajectory) -> _Open:
        if trajectory.turns:
            self._step = trajectory.turns[-1].weight_version or "none"
        if self._step not in self._open:
            if len(self._open) == MAX_OPEN:
                self._close_oldest()
            self._open[self._step] = _Open(self._create(self._step))
        return self._open[self._step]

    def _close_oldest(self) -> None:
        self._open.pop(next(iter(self._open))).folder.close()

    def _create(self, step: str) -> RunFolder:
        name, again = f"step-{step}-{self._worker}", 0
        path = self._root / name
        while path.exists():
            again += 1
            path = self._root / f"{name}-{again}"
        folder = RunFolder.create(path, self._manifest(step))
        saved = self._root / f".tokenizer-{self._worker}"
        if not saved.exists():
            self._tokenizer.save_pretrained(saved)
        shutil.copytree(saved, path / "tokenizer")
        return folder
