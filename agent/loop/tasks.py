"""Task files: JSONL or Parquet rows in verl's dataset schema, or just `{"prompt": "..."}`.

Invariant: a `Task` that exists can be run. Its id is the same whenever the same file is read: the
row's own `id`, else a hash of the row, with `#k` for the k-th repetition. Rows are read lazily.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from agent.errors import TaskError
from conversations import rounds
from conversations.errors import ImageError, MessageError
from conversations.images.sources import ImageSource, hash_of, image_source
from conversations.messages import GivenImages, Message, given_messages, image_parts
from conversations.trajectory import Trajectory, canonical_json

Row = dict[str, Any]

TOOL_KWARGS = ("create_kwargs", "execute_kwargs", "calc_reward_kwargs", "release_kwargs")
_RECORDED = ("id", "prompt", "messages", "images", "data_source", "ground_truth")
"""Keys of a row that have fields of their own in the record; all others are its `extra`."""


@dataclass(frozen=True, slots=True)
class Task:
    """A row: messages, ground truth and tool kwargs.

    `tools_kwargs` is {tool: {create_kwargs, execute_kwargs, ...}}; its keys are the tools that the
    row chooses (`extra_info.tool_selection`, else the row's `tools_kwargs`). If it is empty, all
    tools are offered. `interaction_kwargs` is for the interaction that it names; if it is empty,
    nobody answers a turn without a call. `extra` holds everything else of the row, unchanged.
    `images` are the sources of the messages' image parts, which hold their numbers.
    """

    id: str
    messages: list[Message]
    tools_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ground_truth: Any = None
    data_source: Any = None
    extra: Any = None
    interaction_kwargs: dict[str, Any] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()


def read_tasks(
    path: str | Path, limit: int | None = None, check: Callable[[Task], object] | None = None
) -> Iterator[Task]:
    """Yields the first `limit` tasks of a .jsonl, .json or .parquet file.

    One row is in memory at a time (Parquet: 256). Raises TaskError, naming file and line, for a row
    that is not a task or that `check` refuses, and for a file without rows.
    """
    file = Path(path)
    ids = _Ids()
    place = None
    for place, row in islice(_rows(file), limit):
        try:
            task = _task(row, ids, place, file.parent)
            if check:
                check(task)
        except (TaskError, MessageError) as error:
            raise TaskError(f"{place}: {error}") from error
        yield task
    if place is None:
        raise TaskError(f"{file}: holds no tasks; it needs one row for each")


def recorded_task(trajectory: Trajectory) -> Task:
    """The task that a trajectory came from: messages, ground truth and tool kwargs of its row.

    Raises TaskError if the record's `extra` holds tool kwargs that no row could have.
    """
    extra = trajectory.extra if isinstance(trajectory.extra, dict) else {}
    try:
        info = _mapping(extra, "extra_info")
        tools_kwargs, interaction_kwargs = (
            _tools_kwargs(extra, info),
            _interaction_kwargs(extra, info),
        )
    except TaskError as error:
        raise TaskError(f"trajectory {trajectory.id}: extra: {error}") from error
    messages = trajectory.messages[: task_message_count(trajectory)]
    try:
        images = tuple(ImageSource(sha256=hash_of(part["image"])) for part in image_parts(messages))
        _refuse_files(tools_kwargs)
    except ImageError as error:
        raise TaskError(f"trajectory {trajectory.id}: {error}") from error
    return Task(
        trajectory.task_id,
        messages,
        tools_kwargs,
        trajectory.ground_truth,
        trajectory.data_source,
        trajectory.extra,
        interaction_kwargs,
        images,
    )


def _refuse_files(tools_kwargs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ImageError if a tool would read a file: a record may come from anyone."""
    for tool, kinds in tools_kwargs.items():
        given = kinds.get("create_kwargs", {}).get("image")
        if given is not None and image_source(given).path is not None:
            raise ImageError(
                f"tool {tool}: its image is a file, and no file is read for a record; give the "
                "image itself in the task's create_kwargs, as a data URL"
            )


def task_message_count(trajectory: Trajectory) -> int:
    """How many of a trajectory's messages are the task's own."""
    return rounds.given_length(
        trajectory.messages, trajectory.tools, trajectory.segments, len(trajectory.prompt_ids)
    )


def task_file_hash(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------- files to rows


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row; a place is `file:line`, for Parquet `file: row 1` and so on."""
    readers = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".ndjson": _json_rows,
        ".parquet": _parquet_rows,
    }
    if file.is_dir():
        raise TaskError(f"{file}: is a folder; name a task file in it")
    reader = readers.get(file.suffix)
    if reader is None:
        raise TaskError(
            f"{file}: a task file ends in .jsonl (one JSON object a line) or .parquet, "
            f"not {file.suffix or 'without a suffix'}"
        )
    if not file.is_file():
        raise TaskError(f"{file}: no such task file; `turntrace tasks gsm_symbolic` writes one")
    yield from reader(file)


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", _json_row(line, f"{file}:{number}")
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: is not UTF-8 text: {error}") from error
    except OSError as error:
        raise TaskError(f"{file}: cannot be read: {error.strerror}") from error


def _json_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = (
            "; this looks like one JSON array: write one object a line instead"
            if line.lstrip().startswith("[")
            else ""
        )
        raise TaskError(f"{place}: not a JSON object on one line: {error}{hint}") from error
    if not isinstance(row, dict):
        raise TaskError(
            f'{place}: a task is a JSON object such as {{"prompt": "..."}}, '
            f"got {type(row).__name__}"
        )
    return row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(
            f"{file}: cannot be read as Parquet after row {number}: {str(error).splitlines()[0]}"
        ) from error


def without_nulls(value: Any) -> Any:
    """The value without null keys: Parquet gives every row the keys that any row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------- rows to tasks


def row_hash(row: Any) -> str:
    """The id of a row without one: 16 hex digits of the SHA-256 of its canonical JSON.

    Null keys are left out.
    """
    return hashlib.sha256(canonical_json(without_nulls(row)).encode("ascii")).hexdigest()[:16]


class _Ids:
    """Names each row once: its own id must be unique, a repeated row gets `#k`."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._repeats: dict[str, int] = {}

    def name(self, row: Row, place: str) -> str:
        own = row.get("id")
        if own is None:
            return self._hash(row)
        if isinstance(own, bool) or not isinstance(own, (str, int)) or own == "":
            raise TaskError(f"id must be a string or an integer, got {_got(own)}")
        first = self._places.setdefault(str(own), place)
        if first != place:
            raise TaskError(
                f"the id {own!r} is already used at {first}; ids must differ "
                "(leave them out to have rows hashed)"
            )
        return str(own)

    def _hash(self, row: Row) -> str:
        name = row_hash(row)
        repeat = self._repeats.get(name, 0)
        self._repeats[name] = repeat + 1
        return f"{name}#{repeat}" if repeat else name


def _task(row: Row, ids: _Ids, place: str, folder: Path) -> Task:
    try:
        plain = _json_images(row)
    except RecursionError as error:
        raise TaskError("the row is nested too deeply") from error
    _check_json(plain)
    return row_task(row, ids.name(plain, place), folder)


def row_task(row: Row, name: str, folder: Path | None = None) -> Task:
    """The task of one row, with the id `name`; relative paths of images are in `folder`.

    `images` is verl's column: the texts `<image>` of the messages stand for its entries, in order.
    Raises TaskError or MessageError if the row is no task.
    """
    column = row.get("images")
    if column is not None and not isinstance(column, list):
        raise TaskError(f"images must be a list, got {_got(column)}")
    images = GivenImages(column, folder)
    row = _json_images(row)
    info = _mapping(row, "extra_info")
    reward_model = _mapping(row, "reward_model")
    ground_truth = row.get("ground_truth")
    return Task(
        id=name,
        messages=given_messages(_prompt(row), images),
        tools_kwargs=_with_files_in(folder, _tools_kwargs(row, info)),
        interaction_kwargs=_interaction_kwargs(row, info),
        ground_truth=reward_model.get("ground_truth") if ground_truth is None else ground_truth,
        data_source=row.get("data_source"),
        extra={key: value for key, value in row.items() if key not in _RECORDED} or None,
        images=tuple(images.sources),
    )


def _with_files_in(
    folder: Path | None, tools_kwargs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The kwargs; an image that a tool is created with is in the task file's folder, too."""
    for kinds in tools_kwargs.values():
        created = kinds.get("create_kwargs", {})
        given = created.get("image")
        if folder is None or not isinstance(given, str):
            continue
        try:
            path = image_source(given, folder).path
        except ImageError:
            continue  # the tool's creation says what is wrong with it
        if path is not None:
            kinds["create_kwargs"] = {**created, "image": str(path)}
    return tools_kwargs


def _json_images(value: Any) -> Any:
    """A row's value with each image that holds bytes as a data URL: Parquet has them as structs."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if isinstance(data, bytes) and value.keys() <= {"bytes", "path"}:
            return f"data:;base64,{base64.b64encode(data).decode()}"
        return {key: _json_images(item) for key, item in value.items()}
    return [_json_images(item) for item in value] if isinstance(value, list) else value


def _check_json(row: Row) -> None:
    """Whatever a row carries ends in the record, which is JSON."""
    for key, value in row.items():
        try:
            canonical_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TaskError(
                f"{key} holds what JSON cannot ({error}); drop the column, or write it as text"
            ) from error


def _prompt(row: Row) -> object:
    given = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(given) != 1:
        keys = ", ".join(sorted(row)) or "none"
        problem = "both prompt and messages" if given else "neither prompt nor messages"
        gsm8k = (
            "; turntrace tasks gsm8k makes tasks of GSM8K's own file"
            if {"question", "answer"} <= row.keys()
            else ""
        )
        raise TaskError(
            f"the row has {problem}; it needs one of them, a text or a list of messages "
            f"(its keys: {keys}){gsm8k}"
        )
    prompt = row[given[0]]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise TaskError(f"{given[0]} is empty")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise TaskError(f"{given[0]} must be a text or a list of messages, got {_got(prompt)}")
    return prompt


def _tools_kwargs(row: Row, info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    holder, where = (
        (row, "tools_kwargs")
        if row.get("tools_kwargs") is not None
        else (info, "extra_info.tools_kwargs")
    )
    given = _mapping(holder, "tools_kwargs", where)
    if info.get("need_tools_kwargs") and not given:
        raise TaskError(
            "extra_info.need_tools_kwargs is true but there are no tools_kwargs; "
            "give them, or set it to false"
        )
    tools_kwargs: dict[str, dict[str, Any]] = {}
    for tool in given:
        kinds = _mapping(given, tool, f"{where}.{tool}")
        for kind in kinds:
            if kind not in TOOL_KWARGS:
                raise TaskError(
                    f"{where}.{tool}.{kind} is not known; allowed are {', '.join(TOOL_KWARGS)}"
                )
        tools_kwargs[tool] = {
            kind: dict(_mapping(kinds, kind, f"{where}.{tool}.{kind}")) for kind in kinds
        }
    if selection := _tool_selection(info):
        return {name: tools_kwargs.get(name, {}) for name in selection}
    return tools_kwargs


def _tool_selection(info: Mapping[str, Any]) -> list[str]:
    """The tools that the row chooses by name, as in verl 0.8 and 0.9; [] if it does not choose."""
    selection = info.get("tool_selection") or []
    if not isinstance(selection, list) or not all(isinstance(name, str) for name in selection):
        raise TaskError(
            f"extra_info.tool_selection must be a list of tool names, got {_got(selection)}"
        )
    return selection


def _interaction_kwargs(row: Row, info: Mapping[str, Any]) -> dict[str, Any]:
    holder, where = (
        (row, "interaction_kwargs")
        if row.get("interaction_kwargs") is not None
        else (info, "extra_info.interaction_kwargs")
    )
    return dict(_mapping(holder, "interaction_kwargs", where))


def _mapping(holder: Mapping[str, Any], key: str, where: str | None = None) -> Mapping[str, Any]:
    value = holder.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TaskError(f"{where or key} must be an object, got {_got(value)}")
    return value


def _got(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
