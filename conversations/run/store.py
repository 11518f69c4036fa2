"""A run on disk: a folder of trajectories that survives being killed at any moment.

    run.json             what was run: config, tools, model, tasks, versions, counts
    trajectories.jsonl   one record a line, appended as each conversation ends
    unfinished.jsonl     interrupted conversations, in the same form
    turns.jsonl          of a gateway: a journal of its sessions, one turn a line
    superseded.jsonl     what a later attempt replaced: retried failures, resumed conversations
    replay.jsonl         of a replay: its outcome and first difference for each trajectory
    scores.jsonl         of `verify --engine`: differences of log-probs; see `scores.py`
    evidence/            files that records name; see `conversations.evidence`
    tokenizer/           the tokenizer and chat template, so that the run can be verified anywhere
    images/              the images of its conversations, each once: SHA256.png

Invariants. `trajectories.jsonl` holds each (task, sample) at most once. A line is written and
flushed before the next begins, and is on disk (fsync) about a second later. A resume cuts a torn
last line, and its conversation runs again. One process writes at a time: a lock, which dies with
the process, makes sure.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from conversations.errors import RecordError, RunFolderError
from conversations.evidence import evidence_store
from conversations.run.hash_store import HashStore
from conversations.run.whole_file import sync_folder, write_whole
from conversations.trajectory import Trajectory, read_record
from conversations.upgrade import OLD_SCHEMA, READABLE, SCHEMA

RUN, TRAJECTORIES, UNFINISHED, SUPERSEDED = (
    "run.json",
    "trajectories.jsonl",
    "unfinished.jsonl",
    "superseded.jsonl",
)
JOURNAL = "turns.jsonl"

IMAGES = "images"

IDENTITY = (
    "config",
    "tools",
    "interactions",
    "model",
    "tasks",
    "n",
    "validate",
    "parent",
    "replay",
    "agent",
)
"""The fields of run.json that a resumed run must share with the first.

A forced resume keeps those of the starts before it in `earlier_starts`, the first start first:
`verify` checks records that were made under an earlier start against its limits.
"""

WHEREABOUTS = frozenset(
    {
        "config.model_path",
        "config.rollout.multi_turn.tool_config_path",
        "config.rollout.multi_turn.interaction_config_path",
        "model.path",
        "parent.path",
    }
)
"""Keys that only say where something is. Its content counts: the text of `tools`, the hash in
`model`.
"""

FSYNC_INTERVAL_S = 1.0


class RunFolder:
    """A run folder open for writing. Use `create` or `resume`, and close it (or `with`)."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        lock: IO[str],
        done: set[tuple[str, int]],
        unfinished: Mapping[tuple[str, int], Trajectory] | None = None,
        digest: hashlib._Hash | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.done = done
        self.unfinished = unfinished or {}
        self._digest = digest or hashlib.sha256()
        self._lock = lock
        self._files = _Files(path)

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any]) -> RunFolder:
        """Creates a run with `manifest` as run.json. Raises RunFolderError if there is a run
        already.
        """
        path = Path(path)
        lock = _locked(path)
        try:
            if (path / RUN).exists() or (path / TRAJECTORIES).exists():
                raise RunFolderError(
                    f"{path} already holds a run; use --resume to resume it, or another --out"
                )
            return cls(path, _write_manifest(path, {"schema": SCHEMA, **manifest}), lock, set())
        except BaseException:
            lock.close()
            raise

    @classmethod
    def resume(
        cls, path: str | Path, manifest: Mapping[str, Any], *, force: bool = False
    ) -> RunFolder:
        """Opens an earlier run to resume it.

        `done` holds the (task, sample) pairs that need not run again, `unfinished` the interrupted
        ones. Raises RunFolderError if there is no run, another process writes to it, a file is
        damaged, or `manifest` differs in `IDENTITY`. The error names all differences; `force`
        accepts them.
        """
        path = Path(path)
        if not (path / RUN).exists():
            raise RunFolderError(
                f"{path} holds no run to resume: {RUN} is not there; "
                "leave --resume out to start one"
            )
        lock = _locked(path)
        try:
            earlier = read_manifest(path)
            if (differences := _differences(earlier, manifest)) and not force:
                raise RunFolderError(
                    f"{path} was run differently: {'; '.join(differences)}; "
                    "use --force to resume it all the same"
                )
            _cut_torn_line(path / UNFINISHED)
            _cut_torn_line(path / TRAJECTORIES)
            _cut_torn_line(path / JOURNAL)
            done, digest = _retire_failed(path)
            unfinished = _retire_unfinished(path, done)
            for name in ("counts", "digest"):  # they are what a run says when it closes
                earlier.pop(name, None)
            fresh = {**earlier, **manifest, "schema": SCHEMA, "created": earlier.get("created")}
            if differences:
                start = {name: earlier.get(name) for name in IDENTITY}
                fresh["earlier_starts"] = [*earlier.get("earlier_starts", ()), start]
            manifest = _write_manifest(path, fresh)
            return cls(path, manifest, lock, done, unfinished, digest)
        except OSError as error:
            lock.close()
            raise _unwritable(path, error) from error
        except BaseException:
            lock.close()
            raise

    def note(self, name: str, value: Any) -> None:
        """Adds a field to run.json that is only known after the start."""
        self.manifest = _write_manifest(self.path, {**self.manifest, name: value})

    def keep_evidence(self, data: bytes) -> None:
        """Writes the evidence file that a record names. Call it before the record is written."""
        evidence_store(self.path).put(data)

    def append(self, trajectory: Trajectory) -> str:
        """Writes a finished conversation; returns its line.

        Raises RunFolderError if its (task, sample) is there already, RecordError if it has no JSON
        form.
        """
        key = (trajectory.task_id, trajectory.sample)
        if key in self.done:
            raise RunFolderError(
                f"{self.path}: trajectory {trajectory.id} is there already; task ids must be unique"
            )
        line = trajectory.to_line()
        self._files.append(TRAJECTORIES, line.encode("ascii"))
        self._digest.update(line[-66:-2].encode())
        self.done.add(key)
        return line

    def image_store(self, trajectory: Trajectory | None = None) -> HashStore:
        """Where images are kept. Put a conversation's there before its record is appended."""
        return image_store(self.path)

    def append_unfinished(self, trajectory: Trajectory) -> None:
        """Writes what there is of an interrupted conversation."""
        self._files.append(UNFINISHED, trajectory.to_line().encode("ascii"))

    def append_journal(self, line: bytes) -> None:
        """Writes a line of a gateway's journal. Raises RunFolderError."""
        self._files.append(JOURNAL, line)

    def keep_journal(self, lines: Iterable[bytes]) -> None:
        """Replaces the journal by those of its lines that are still needed."""
        _replace(self.path / JOURNAL, lines)

    def close(self, counts: Mapping[str, Any] | None = None) -> None:
        """Syncs and unlocks. Safe to call twice.

        `counts` go into run.json, with the digest of all finished records: the SHA-256 of their
        `sha256` in order (`jq -jr .sha256 trajectories.jsonl | sha256sum`).
        """
        if self._lock.closed:
            return
        try:
            self._files.close()
            _retire_unfinished(self.path, self.done)
            if counts is not None:
                self.manifest = _write_manifest(
                    self.path,
                    {**self.manifest, "counts": dict(counts), "digest": self._digest.hexdigest()},
                )
        finally:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def image_store(path: Path) -> HashStore:
    """The images of the run folder `path`: PNG files."""
    return HashStore(path / IMAGES, ".png")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """run.json as a dict. Raises RunFolderError if it is missing, damaged or of another schema."""
    file = Path(path) / RUN
    if file.exists() and not file.is_file():
        raise RunFolderError(f"{file} is not a file")  # a named pipe would wait for its writer
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(f"{path} holds no run: there is no {RUN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") not in READABLE:
        raise RunFolderError(f"{file} is not the run.json of a {' or '.join(READABLE)} run")
    return manifest


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """The finished trajectories of a run folder or a .jsonl file, each checked against its hash.

    Raises RunFolderError with file and line.
    """
    file = Path(path) / TRAJECTORIES if Path(path).is_dir() else Path(path)
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Trajectory.from_line(line.decode())
                except (RecordError, UnicodeDecodeError) as error:
                    raise RunFolderError(f"{file}:{number}: {error}") from error
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read: {error.strerror}") from error


class _Files:
    """The open files, and one thread that syncs what was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[str, FileIO] = {}
        self._dirty: set[str] = set()
        self._sync_error: OSError | None = None
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._sync_forever, name="turntrace-fsync", daemon=True
        )
        self._thread.start()

    def append(self, name: str, line: bytes) -> None:
        with self._guard:
            try:
                if self._sync_error:
                    raise self._sync_error
                if name not in self._open:
                    self._open[name] = FileIO(self._path / name, "ab")
                    sync_folder(self._path)
                _write_whole(self._open[name], line + b"\n")
            except OSError as error:
                raise _unwritable(self._path / name, error) from error
            self._dirty.add(name)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._sync()
        except OSError as error:
            raise _unwritable(self._path, error) from error
        finally:
            for file in self._open.values():
                file.close()

    def _sync_forever(self) -> None:
        while not self._stop.wait(FSYNC_INTERVAL_S):
            try:
                self._sync()
            except OSError as error:  # the system tells it once; the next append reports it
                self._sync_error = error
                return

    def _sync(self) -> None:
        with self._guard:
            files = [self._open[name] for name in self._dirty]
            self._dirty.clear()
        for file in files:
            os.fsync(file.fileno())


def _write_whole(file: FileIO, data: bytes) -> None:
    """Appends all of `data`, or nothing: what a full disk took is removed again."""
    start = file.seek(0, os.SEEK_END)
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path} cannot be written: {error.strerror}; make room and --resume")


def _locked(path: Path) -> IO[str]:
    """The run's lock, held until the returned file is closed or the process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be used as a run folder: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RunFolderError(
            f"another process is writing to {path}; wait for it to end, or use another --out"
        ) from error
    return lock


def _write_manifest(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    _replace(
        path / RUN,
        [
            (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(
                errors="backslashreplace"
            )
        ],
    )
    return manifest


def _replace(file: Path, content: Iterable[bytes]) -> None:
    try:
        write_whole(file, content)
    except OSError as error:
        raise _unwritable(file, error) from error


def _differences(earlier: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """The differences between two runs, one phrase for each key.

    A key that a run of an older schema does not have is no difference: that version did not know
    it. `agent.reward` is younger than its schema.
    """
    old, new = (
        {
            key: value
            for name in IDENTITY
            for key, value in _flat(name, source.get(name))
            if key not in WHEREABOUTS
        }
        for source in (earlier, manifest)
    )
    return [
        f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}"
        for key in (old if earlier.get("schema") == OLD_SCHEMA else {**old, **new})
        if _content(key, old.get(key)) != _content(key, new.get(key))
        and not (key == "agent.reward" and "agent.command" in old and key not in old)
    ]


def _content(key: str, value: Any) -> Any:
    """What a field of run.json says. Comments and layout of the YAML texts in it do not count."""
    if key not in ("tools", "interactions") or not isinstance(value, str):
        return value
    try:
        return json.dumps(yaml.safe_load(value), default=str, sort_keys=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}", part)
    else:
        yield prefix, json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _cut_torn_line(file: Path) -> None:
    """Cuts a last line without a newline. A complete line that is damaged is not cut."""
    if not file.exists():
        return
    with file.open("rb+") as lines:
        end = _last_line_start(lines)
        lines.seek(end)
        if not lines.read().endswith(b"\n"):
            lines.truncate(end)
            os.fsync(lines.fileno())


def _last_line_start(lines: IO[bytes]) -> int:
    """The byte position of the last line, searched from the end."""
    size = position = lines.seek(0, os.SEEK_END)
    tail = b""
    while position > 0:
        step = min(1 << 16, position)
        position -= step
        lines.seek(position)
        tail = lines.read(step) + tail
        found = tail.rfind(b"\n", 0, len(tail) - 1)
        if found >= 0:
            return position + found + 1
    return size - len(tail)


def _retire_failed(path: Path) -> tuple[set[tuple[str, int]], hashlib._Hash]:
    """Moves infrastructure failures to superseded.jsonl. Returns the remaining pairs and their
    digest.
    """
    done, digest, failed = _sort_out(path / TRAJECTORIES)
    _lay_aside(path, failed)
    if failed:
        _drop(path / TRAJECTORIES, set(failed))
    return done, digest


def _retire_unfinished(path: Path, done: set[tuple[str, int]]) -> dict[tuple[str, int], Trajectory]:
    """Moves conversations that ended or were interrupted again to superseded.jsonl.

    Returns the others by (task, sample).
    """
    unfinished: dict[tuple[str, int], tuple[bytes, Trajectory]] = {}
    stale = []
    count = 0
    for line in _lines(path / UNFINISHED):
        count += 1
        try:
            record = Trajectory.from_line(line.decode())
        except (RecordError, ValueError):
            stale.append(line)
            continue
        key = (record.task_id, record.sample)
        if (
            key in unfinished and (earlier := unfinished.pop(key)[0]) != line
        ):  # the same line again: it was interrupted before it progressed
            stale.append(earlier)
        if key in done:
            stale.append(line)
        else:
            unfinished[key] = line, record
    if count > len(unfinished):
        _lay_aside(path, stale)
        _replace(path / UNFINISHED, (line for line, _ in unfinished.values()))
    return {key: record for key, (_, record) in unfinished.items()}


def _lay_aside(path: Path, lines: Sequence[bytes]) -> None:
    """Adds lines to superseded.jsonl.

    They are on disk there before they are removed elsewhere, so a kill in between loses nothing. A
    line that such a kill left in both places is not added again.
    """
    known = set(_lines(path / SUPERSEDED)) if lines else set()
    if fresh := [line for line in lines if line not in known]:
        _cut_torn_line(path / SUPERSEDED)
        with (path / SUPERSEDED).open("ab") as out:
            out.writelines(fresh)
            out.flush()
            os.fsync(out.fileno())


def _sort_out(file: Path) -> tuple[set[tuple[str, int]], hashlib._Hash, list[bytes]]:
    """The finished pairs, their digest, and the lines of infrastructure failures."""
    kept: set[tuple[str, int]] = set()
    digest = hashlib.sha256()
    retired: list[bytes] = []
    for number, line in enumerate(_lines(file), 1):
        try:
            record = read_record(line.decode())
            key = (str(record["task_id"]), int(record["sample"]))
        except (RecordError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"{file}:{number} is damaged: {error}; "
                "repair that line, or delete it to run its conversation again"
            ) from error
        if record["infra_error"]:
            retired.append(line)
        elif key in kept:
            raise RunFolderError(
                f"{file}:{number} holds trajectory {key[0]}-{key[1]} a second time; "
                "move the run away or delete that line"
            )
        else:
            kept.add(key)
            digest.update(record["sha256"].encode())
    return kept, digest, retired


def _lines(file: Path) -> Iterator[bytes]:
    if file.is_file():
        with file.open("rb") as lines:
            yield from lines


def _drop(file: Path, lines: set[bytes]) -> None:
    _replace(file, (line for line in _lines(file) if line not in lines))
