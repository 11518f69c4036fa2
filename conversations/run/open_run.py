"""A run folder read: its trajectories in file order, by id, by group, or as a table.

    run = conversations.open_run("out")
    for trajectory in run: ...          # one at a time, each checked against its hash
    run["gsm8k-17-2"].reward
    run.to_pandas(columns=["id", "reward", "stop_reason"])

Invariant: a `Run` is what was on disk when it was opened, and reading changes nothing: it takes no
lock and writes nothing. A torn last line (of a run in progress) is not there yet. Memory holds an
id and an offset for each trajectory, besides the tokenizer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import weakref
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversations.errors import RecordError, RunFolderError
from conversations.extras import pandas
from conversations.run.store import TRAJECTORIES, UNFINISHED, image_store, read_manifest
from conversations.trajectory import Trajectory, parse_record, read_record

if TYPE_CHECKING:
    from conversations.images.processor import ImageProcessor
    from conversations.template import ChatTemplate, Reading

TOKENIZER = "tokenizer"

ID = re.compile(rb'"id":("(?:[^"\\]|\\.)*"),"infra_error":(?:true|false),"messages":')
"""The id in a record line as turntrace writes it, with sorted keys. If it is found twice (a record
inside `extra`), the whole line is parsed.
"""
MOST_BYTES = 1 << 28
"""Of one image's file."""
_BLOCK = 1 << 20


def open_run(path: str | Path) -> Run:
    """The run in a folder as it is now: finished, in progress, or copied from elsewhere.

    Raises RunFolderError if there is none.
    """
    return Run(path)


class Run:
    """A run folder open for reading: its folder `path`, its run.json `manifest`.

    `len()` is the number of finished trajectories. A damaged line raises RunFolderError with file
    and line. Open the run again to see what was written since.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self._finished = _Lines(self.path / TRAJECTORIES)
        self._unfinished = _Lines(self.path / UNFINISHED)

    # ------------------------------------------------------------------ trajectories

    @property
    def ids(self) -> Collection[str]:
        """The ids of the finished trajectories, in file order."""
        return self._index.keys()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, trajectory_id: object) -> bool:
        return trajectory_id in self._index

    def __iter__(self) -> Iterator[Trajectory]:
        """The finished trajectories, in file order, one in memory at a time."""
        return (self._finished.trajectory(row) for row in self._index.values())

    def __getitem__(self, trajectory_id: str) -> Trajectory:
        """One trajectory by its id. Raises RunFolderError, naming similar ids, if there is none."""
        return self._finished.trajectory(self._row(trajectory_id))

    def records(self, *, check: bool = True) -> Iterator[dict[str, Any]]:
        """The finished trajectories as plain dicts.

        `check=False` does not check their hashes, and takes half the time.
        """
        return (self._finished.record(row, check=check) for row in self._index.values())

    def record(self, trajectory_id: str, *, check: bool = True) -> dict[str, Any]:
        """One trajectory as a plain dict."""
        return self._finished.record(self._row(trajectory_id), check=check)

    def groups(self) -> Iterator[tuple[str, list[Trajectory]]]:
        """Each task's id with its samples in order, one group in memory at a time."""
        for task_id, ids in self.group_ids().items():
            yield task_id, [self[trajectory_id] for trajectory_id in ids]

    def group_ids(self) -> dict[str, list[str]]:
        """The ids of each task's samples, by sample; tasks in order of their first trajectory."""
        groups: dict[str, list[str]] = {}
        for trajectory_id in self._index:
            groups.setdefault(trajectory_id.rpartition("-")[0], []).append(trajectory_id)
        for ids in groups.values():
            ids.sort(key=_sample)
        return groups

    def unfinished(self) -> Iterator[Trajectory]:
        """The interrupted trajectories that were not resumed yet."""
        return (self._unfinished.trajectory(row) for row in range(len(self._unfinished)))

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        """The row of each id, found without parsing the records."""
        index: dict[str, int] = {}
        for row in range(len(self._finished)):
            trajectory_id = self._finished.id(row)
            first = index.setdefault(trajectory_id, row)
            if first != row:
                raise self._finished.error(
                    row, f"trajectory {trajectory_id} stands already on line {first + 1}"
                )
        return index

    def _row(self, trajectory_id: str) -> int:
        row = self._index.get(trajectory_id)
        if row is None:
            raise RunFolderError(
                f"{self.path} has no trajectory {trajectory_id!r}; {self._near(trajectory_id)}"
            )
        return row

    def _near(self, name: str) -> str:
        """Suggestions for an unknown id: the task's samples, similar ids, or the first ones."""
        from difflib import get_close_matches

        alike = [known for known in self._index if known.startswith(str(name))][
            :3
        ] or get_close_matches(str(name), self._index)
        shown = alike or list(self._index)[:3]
        return (
            f"{'there is' if alike else 'its first are'} {', '.join(shown)}"
            if shown
            else "it has none yet"
        )

    def evidence(self, trajectory_id: str) -> dict[str, Any]:
        """A trajectory's per-token evidence: numpy arrays by name, empty if it has none.

        `conversations.evidence` documents them. Raises RunFolderError or RecordError if the file is
        missing, changed or no evidence.
        """
        from conversations.evidence import evidence_of

        return evidence_of(self.path, self[trajectory_id])

    # ------------------------------------------------------------------ the tokenizer

    def tokenizer(self) -> Any:
        """The run's own tokenizer as transformers has it, from its `tokenizer/`.

        No code in it is run. Raises ModuleNotFoundError without transformers.
        """
        from conversations.run.saved_tokenizer import load_transformers_tokenizer

        return load_transformers_tokenizer(self.path / TOKENIZER)

    def template(self) -> ChatTemplate:
        """The run's chat template with its config's arguments, loaded once. Raises TemplateError if
        it is unusable.
        """
        return self._template

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return saved_template(self.path / TOKENIZER, self.manifest)

    # ------------------------------------------------------------------ images

    def image(self, sha256: str) -> bytes:
        """An image of the run, a PNG file's bytes, checked against its hash.

        Raises RunFolderError if it is not there or was changed.
        """
        return image_store(self.path).read(sha256, most=MOST_BYTES)

    # ------------------------------------------------------------------ tables

    def to_arrow(self, columns: Collection[str] | None = None) -> Any:
        """The finished trajectories as a `pyarrow.Table`; `conversations.arrow` documents its
        columns.
        """
        from conversations.arrow import table

        return table(self.records(check=False), columns)

    def to_pandas(self, columns: Collection[str] | None = None) -> Any:
        """The same as a `pandas.DataFrame`."""
        pandas()
        return self.to_arrow(columns).to_pandas()


def saved_template(
    folder: Path, manifest: dict[str, Any], *, name: str | None = None
) -> ChatTemplate:
    """The chat template in a run's `tokenizer/` as its run.json says it was used.

    `name` stands for the folder in messages. Raises RunFolderError, TemplateError.
    """
    from conversations.run.saved_tokenizer import load_tokenizer
    from conversations.template import ChatTemplate

    tokenizer = load_tokenizer(folder)
    tokenizer.name_or_path = name or tokenizer.name_or_path
    images = recorded_processor(manifest, tokenizer)
    kwargs, reading = template_kwargs(manifest), recorded_reading(manifest)
    return ChatTemplate(tokenizer, kwargs=kwargs, reading=reading, images=images)


def template_kwargs(manifest: dict[str, Any]) -> dict[str, Any]:
    """The template arguments of the run's config (`enable_thinking` and the like)."""
    found: Any = manifest
    for key in ("config", "rollout", "turntrace", "apply_chat_template_kwargs"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def recorded_processor(manifest: dict[str, Any], tokenizer: Any) -> ImageProcessor | None:
    """The run's image processor; None if its model saw no images. Raises TemplateError."""
    from conversations.images.processor import read_processor

    entry = manifest.get("image_processor")
    if not isinstance(entry, dict) or not isinstance(entry.get("settings"), dict):
        return None
    return read_processor(str(entry.get("name")), entry["settings"], tokenizer)


def recorded_reading(manifest: dict[str, Any]) -> Reading:
    """How the run read its turns. Runs that do not say so read hermes calls."""
    from conversations.template import Reading

    entry = manifest.get("call_format")
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return Reading("hermes", unproven=True)
    in_thoughts = entry.get("calls_in_thoughts") is True
    return Reading(entry["name"], unproven=True, calls_in_thoughts=in_thoughts)


def _sample(trajectory_id: str) -> int:
    return int(trajectory_id.rpartition("-")[2])


class _Lines:
    """The complete lines of a file as it was when it was opened. A missing file has none."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._descriptor = os.open(
                file, os.O_RDONLY | os.O_NONBLOCK
            )  # a named pipe would wait for its writer
            weakref.finalize(self, os.close, self._descriptor)
            self._size = os.fstat(self._descriptor).st_size
            os.pread(self._descriptor, 1, 0)  # a directory opens, and cannot be read
        except FileNotFoundError:
            self._descriptor, self._size = -1, 0
        except OSError as error:
            raise RunFolderError(f"{file} cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._ends)

    @functools.cached_property
    def _ends(self) -> array[int]:
        """The end of each line, with its newline. What comes after the last newline is torn."""
        ends = array("Q")
        for start in range(0, self._size, _BLOCK):
            block = os.pread(self._descriptor, min(_BLOCK, self._size - start), start)
            position = block.find(b"\n")
            while position >= 0:
                ends.append(start + position + 1)
                position = block.find(b"\n", position + 1)
        return ends

    def line(self, row: int) -> bytes:
        start = self._ends[row - 1] if row else 0
        return os.pread(self._descriptor, self._ends[row] - start, start)

    def id(self, row: int) -> str:
        """The record's id. Raises RunFolderError if it does not end in `-sample`."""
        found = ID.findall(line := self.line(row))
        try:
            name = json.loads(found[0]) if len(found) == 1 else parse_record(line.decode())["id"]
        except (RecordError, ValueError) as error:
            raise self.error(row, str(error)) from error
        if not isinstance(name, str) or not name.rpartition("-")[2].isdecimal():
            raise self.error(row, f"the id is {name!r}, expected task-sample")
        return name

    def record(self, row: int, *, check: bool = True) -> dict[str, Any]:
        try:
            text = self.line(row).decode()
            return read_record(text) if check else parse_record(text)
        except (RecordError, UnicodeDecodeError) as error:
            raise self.error(row, str(error)) from error

    def trajectory(self, row: int) -> Trajectory:
        try:
            return Trajectory.from_record(self.record(row))
        except RecordError as error:
            raise self.error(row, str(error)) from error

    def error(self, row: int, what: str) -> RunFolderError:
        return RunFolderError(f"{self.file}:{row + 1}: {what}")
