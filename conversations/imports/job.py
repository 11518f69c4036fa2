"""`turntrace import`: checks every document of a source and writes it as a record.

Invariant: the run folder exists complete or not at all (`new_folder`), and it holds every document
that is not among the defects, or named by a warning of the record that it continues.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conversations.checks.facts import RunFacts, facts_of
from conversations.errors import ConversationsError, ImportFileError, RunFolderError
from conversations.images.processor import load_processor
from conversations.imports.continuations import continuations
from conversations.imports.files import SourceDefect, SourceDocument, documents, source_files
from conversations.imports.proof import proven
from conversations.run.new_folder import new_folder
from conversations.run.open_run import TOKENIZER
from conversations.run.saved_tokenizer import class_and_message, load_tokenizer
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate, Reading
from conversations.trajectory import Trajectory

Reader = Callable[[SourceDocument], Trajectory]
"""Reads a document as a trajectory. Raises ImportFileError with a line for each thing wrong."""


@dataclass(slots=True)
class Imported:
    """The result of an import: counts of trajectories, and defects as `place: text`."""

    trajectories: int = 0
    with_ids: int = 0
    defects: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    """The number of records with each warning."""


def import_run(
    source: str | Path,
    kind: str,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    images: str | Path | None = None,
    command: str = "",
) -> Imported:
    """Writes the documents in `source`, a file or a folder of files, into the new run folder `out`.

    `kind` is atif or verl. `tokenizer`, a folder with a tokenizer.json, is what the ids belong to
    and goes into the run. `images` is the folder below which documents may name image files; data
    URLs need none, and nothing else is read. Raises ImportFileError if no document could be
    imported, `out` exists, or `images` is no folder or not for this `kind`.
    """
    source, out = Path(source), Path(out)
    files = source_files(source)
    if images and kind == "verl":
        raise ImportFileError("--images is for --from atif: verl's files name no images")
    if images and not Path(images).is_dir():
        raise ImportFileError(f"--images {images}: there is no such folder")
    template = _template(Path(tokenizer)) if tokenizer else None
    continued = continuations(files) if kind == "atif" else {}
    reader, done = _reader(kind, template, continued, Path(images) if images else None), Imported()
    waiting = deque(file for file in files if file not in continued.values())
    with new_folder(out, ImportFileError) as folder:
        if template is not None:
            template.tokenizer.save_pretrained(folder / TOKENIZER)
        manifest = _manifest(source, kind, files, command)
        if template is not None:
            manifest["call_format"] = template.format_entry()
            if template.images is not None:
                manifest["image_processor"] = template.images.as_json()
        facts = facts_of(manifest, template, folder)
        with RunFolder.create(folder, manifest) as store:
            asked = 0
            while waiting:
                file = waiting.popleft()
                for document in documents([file]):
                    asked += 1
                    is_taken = _take(document, reader, facts, store, done)
                    later = continued.get(file)
                    if later and not is_taken:  # what continues a defect stands alone
                        waiting.append(later)
            store.close({"asked": asked, "done": done.trajectories})
        (folder / ".lock").unlink(missing_ok=True)
        if not done.trajectories:
            first = f"; the first defect: {done.defects[0]}" if done.defects else ""
            raise ImportFileError(f"{source}: no trajectory could be imported{first}")
    return done


def _template(folder: Path) -> ChatTemplate:
    """A tokenizer's chat template. Turns are read as hermes if it proves no call format."""
    tokenizer = load_tokenizer(folder)
    images = load_processor(folder, tokenizer)
    template = ChatTemplate(tokenizer, images=images)
    if template.format_report().is_proven:
        return template
    return ChatTemplate(tokenizer, reading=Reading("hermes", unproven=True), images=images)


def _reader(
    kind: str,
    template: ChatTemplate | None,
    continued: Mapping[Path, Path],
    images: Path | None,
) -> Reader:
    from conversations.imports import atif, verl

    readers: dict[str, Callable[[], Reader]] = {
        "atif": lambda: atif.AtifReader(template, continued, images),
        "verl": lambda: verl.VerlReader(template),
    }
    if kind not in readers:
        raise ImportFileError(f"--from {kind}: allowed are {', '.join(readers)}")
    return readers[kind]()


def _take(
    document: SourceDocument | SourceDefect,
    reader: Reader,
    facts: RunFacts,
    store: RunFolder,
    done: Imported,
) -> bool:
    """Writes one document; returns whether it could. Any error is a defect of that document."""
    if isinstance(document, SourceDefect):
        done.defects.append(str(document))
        return False
    try:
        read = reader(document)
        for picture in getattr(reader, "pictures", ()):
            store.image_store().put(picture.png)
        trajectory = proven(read, facts)
        if (trajectory.task_id, trajectory.sample) in store.done:
            raise ImportFileError(f"trajectory {trajectory.id} is there already")
        store.append(trajectory)
    except RunFolderError:
        raise
    except ConversationsError as error:
        done.defects += [f"{document.place}: {line}" for line in str(error).splitlines()]
        return False
    except Exception as error:
        what = f"could not be read, which is an error of turntrace: {class_and_message(error)}"
        done.defects.append(f"{document.place}: {what}")
        return False
    done.trajectories += 1
    done.with_ids += bool(trajectory.turns)
    done.warnings.update(warning.text for warning in trajectory.warnings)
    return True


def _manifest(source: Path, kind: str, files: list[Path], command: str) -> dict[str, Any]:
    """run.json of an imported run. `imported` names the source; what a source does not tell is
    null.
    """
    hashes = {file.name: _sha256(file) for file in files}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": {},
        "tools": None,
        "model": {"path": None, "sha256": None},
        "tasks": {
            "file": source.name,
            "sha256": hashes[files[0].name] if len(files) == 1 else None,
        },
        "limit": None,
        "n": None,
        "validate": False,
        "seed": None,
        "versions": {"turntrace": _version()},
        "parent": None,
        "imported": {"from": kind, "files": hashes},
    }


def _version() -> str | None:
    try:
        return importlib.metadata.version("turntrace")
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
