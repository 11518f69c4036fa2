"""ATIF documents as records: turntrace's own come back unchanged, others with the tokens they have.

The `atif` package's models check the structure, this file what they accept: invalid token ids,
log-probs that do not line up. Every generation of a foreign document must have the ids of its
prompt and its own, each prompt starting with all tokens before it; otherwise it is imported without
tokens, and a warning says why. Embedded subagents and the files that continue a document become
branches.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from conversations.atif import OWN, record_of
from conversations.checks.shape import shape_findings
from conversations.checks.tokens import token_findings
from conversations.errors import ConversationsError, ImportFileError, RecordError
from conversations.images.reading import Picture
from conversations.imports.atif_steps import ForeignConversation
from conversations.imports.continuations import (
    REFERENCE,
    chain,
    is_own_document,
    read_continuation,
)
from conversations.imports.files import SourceDefect, SourceDocument
from conversations.imports.source_images import SourceImages
from conversations.template import ChatTemplate
from conversations.trajectory import Branch, Trajectory, canonical_json, line_hash
from conversations.upgrade import upgraded

MAX_ERRORS = 10
MAX_ID = 1 << 31
ROUNDING = 1e-3
"""A log-prob may be this far above 0: an engine's softmax rounds."""
CHANGED = (
    "the ATIF document was changed after turntrace wrote it: the record does not match its hash"
)

_SEQUENCE = tuple(
    item.name for item in fields(Branch) if item.name not in ("parent", "reason", "client")
)


class AtifReader:
    """Reads documents. Those with the same `session_id` and no `trajectory_id` are one group, in
    order. `continued` has the files that continue others. `images` is the folder below which their
    images may be files, `pictures` are those of the last document.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        continued: Mapping[Path, Path] | None = None,
        images: Path | None = None,
    ) -> None:
        self._template = template
        self._continued = continued or {}
        self._folder = images
        self.pictures: list[Picture] = []
        self._samples: Counter[str] = Counter()

    def __call__(self, document: SourceDocument) -> Trajectory:
        found = document.value
        self.pictures.clear()
        _check_structure(found)
        _check_numbers(found)
        if is_own_document(found):
            return Trajectory.from_record(_own(found))
        return Trajectory.from_record(self._foreign(found, Path(document.place)))

    def _foreign(self, found: dict[str, Any], file: Path) -> dict[str, Any]:
        name = found.get("trajectory_id") or found.get("session_id")
        task_id = str(
            name or hashlib.sha256(canonical_json(found).encode("ascii")).hexdigest()[:16]
        )
        sample = self._samples[task_id]
        if found.get("trajectory_id") and sample:
            raise ImportFileError(f"trajectory_id {task_id!r} is there already")
        record = self._read(found, task_id, sample)
        for agent in _subagents(found):
            self._add_subagent(record, agent)
        named = found.get(REFERENCE)
        if named and file not in self._continued:
            place = "which is no such file of the source, or continues another"
            _warn(record, f"it is continued in {named[:80]!r}, {place}")
        for later in chain(self._continued, file):
            self._add_continuation(record, later)
        self._samples[task_id] += 1
        return record

    def _read(self, found: dict[str, Any], task_id: str, sample: int) -> dict[str, Any]:
        images = SourceImages(self._folder)
        record = ForeignConversation(found, self._template, images).record(task_id, sample)
        self.pictures += images.pictures
        return record

    def _add_subagent(self, record: dict[str, Any], found: dict[str, Any]) -> None:
        _check_numbers(found)
        name = str(found["trajectory_id"])
        client = {"agent": found["agent"]["name"], "trajectory_id": name}
        self._add_branch(record, found, f"the subagent {name[:80]}", client)

    def _add_continuation(self, record: dict[str, Any], file: Path) -> None:
        """Adds what a further file says, and its subagents. A warning names what is damaged."""
        what, document = f"the continuation {file.name[:80]}", read_continuation(file)
        with _left_out(record, what):
            if isinstance(document, SourceDefect):
                raise ImportFileError(document.what)
            _check_structure(document.value)
            _check_numbers(document.value)
            self._add_branch(record, document.value, what, {"continuation": file.name})
            for agent in _subagents(document.value):
                with _left_out(record, f"a subagent of {what}"):
                    self._add_subagent(record, agent)

    def _add_branch(
        self, record: dict[str, Any], found: dict[str, Any], what: str, client: dict[str, Any]
    ) -> None:
        """Adds a conversation as a branch that shares nothing with the rest.

        One without tokens has no place among the branches: a warning says so.
        """
        one = self._read(found, record["task_id"], record["sample"])
        if not one["turns"]:
            _warn(record, f"{what} has no token ids: it was left out")
            return
        record["warnings"] += [w for w in one["warnings"] if w not in record["warnings"]]
        own = {item: one[item] for item in _SEQUENCE}
        record["branches"].append({"parent": None, "reason": "new", "client": client, **own})


@contextmanager
def _left_out(record: dict[str, Any], what: str) -> Iterator[None]:
    """A part that cannot be read is left out, and a warning says why."""
    try:
        yield
    except ConversationsError as error:
        _warn(record, f"{what} was left out: {' '.join(str(error).splitlines()[:1])}")


def _warn(record: dict[str, Any], text: str) -> None:
    record["warnings"].append({"kind": "imported", "text": text})


def _subagents(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The embedded subagents of a document, those of subagents included, outer ones first."""
    pending = list(found.get("subagent_trajectories") or ())
    while pending:
        one = pending.pop(0)
        yield one
        pending += one.get("subagent_trajectories") or ()


def _check_structure(found: dict[str, Any]) -> None:
    """Raises ImportFileError with a line for each of the first `MAX_ERRORS` violations of ATIF."""
    try:
        import atif
    except ImportError as error:
        raise ImportFileError(
            "ATIF is read with the atif package, which is not installed: pip install atif"
        ) from error
    from pydantic import ValidationError

    version = found.get("schema_version")
    if not isinstance(version, str) or not version.startswith("ATIF-v1."):
        raise ImportFileError(
            f"schema_version is {version!r:.60}, expected ATIF-v1.8 or an earlier 1.x"
        )
    try:
        atif.Trajectory.model_validate(found, strict=True)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, one['loc'])) or 'document'}: {one['msg']}"
            for one in error.errors(include_url=False)
        ]
        more = [f"{len(lines) - MAX_ERRORS} more"] if len(lines) > MAX_ERRORS else []
        raise ImportFileError(
            "\n".join([" ".join(line.split())[:300] for line in lines[:MAX_ERRORS]] + more)
        ) from error


def _check_numbers(found: dict[str, Any]) -> None:
    """Raises ImportFileError for numbers that the models accept but a record cannot hold."""
    if not found["steps"]:
        raise ImportFileError("it has no steps")
    for step in found["steps"]:
        metrics = step.get("metrics") or {}
        where = f"steps.{step['step_id'] - 1}.metrics"
        for name in ("prompt_token_ids", "completion_token_ids"):
            if wrong := next(
                (token for token in metrics.get(name) or [] if not 0 <= token < MAX_ID), None
            ):
                raise ImportFileError(f"{where}.{name}: {wrong} is no token id")
        logprobs = metrics.get("logprobs")
        if logprobs is None:
            continue
        if len(logprobs) != (count := len(metrics.get("completion_token_ids") or [])):
            raise ImportFileError(
                f"{where}.logprobs: {len(logprobs)} log-probs for {count} completion_token_ids"
            )
        wrong_at = next(
            (
                place
                for place, value in enumerate(logprobs)
                if not (math.isfinite(value) and value < ROUNDING)
            ),
            None,
        )
        if wrong_at is not None:
            raise ImportFileError(
                f"{where}.logprobs.{wrong_at}: {logprobs[wrong_at]!r:.60} is no log-probability"
            )


def _own(found: dict[str, Any]) -> dict[str, Any]:
    """The record that turntrace wrote. Raises ImportFileError if it is damaged."""
    try:
        written = record_of(found)
        unchanged = line_hash(written) == written["sha256"]
        record = upgraded(written)
    except RecordError as error:
        raise ImportFileError(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ImportFileError(
            f"extra.{OWN} is damaged: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not unchanged:
        _check_record(record)
        record["warnings"] = [*record["warnings"], {"kind": "imported", "text": CHANGED}]
    return record


def _check_record(record: dict[str, Any]) -> None:
    """Raises ImportFileError if the record's form or tokens are damaged."""
    findings = list(shape_findings(record)) or list(token_findings(Trajectory.from_record(record)))
    if findings:
        raise ImportFileError(
            "\n".join(f"extra.{OWN}: {finding.what}" for finding in findings[:MAX_ERRORS])
        )
