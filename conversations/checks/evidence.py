"""A record's evidence file against its hash, its lengths and the record.

What the file says of the model, a log-prob or an expert, cannot be checked without the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversations.checks.finding import Finding, differs, quoted
from conversations.errors import RecordError, RunFolderError
from conversations.evidence import KINDS, evidence_hash, evidence_of, honoured, mismatches
from conversations.trajectory import Trajectory


def evidence_findings(trajectory: Trajectory, run: Path) -> Iterator[Finding]:
    """What is wrong with the evidence of a record in the run folder `run`."""
    note = trajectory.engine.get("evidence")
    if note is None:
        return
    if problem := _note_problem(note):
        yield Finding(f"engine.evidence {problem}")
        return
    if evidence_hash(trajectory.engine) is None:
        arrays: dict[str, Any] = {}
    else:
        try:
            arrays = evidence_of(run, trajectory)
        except (RecordError, RunFolderError) as error:
            yield Finding(f"its evidence: {error}")
            return
    problems = list(mismatches(arrays, trajectory))
    yield from (Finding(f"its evidence: {problem}") for problem in problems)
    if problems:
        return
    found = {**dict.fromkeys(note["asked"], 0), **honoured(arrays)}
    if found != note["honoured"]:
        yield Finding(differs("engine.evidence.honoured", note["honoured"], found))
    k = arrays["top_ids"].shape[1] if "top_ids" in arrays else None
    if k is not None and k != note["asked"].get("top_logprobs"):
        yield Finding(differs("its evidence: top_ids", k, note["asked"].get("top_logprobs")))


def _note_problem(note: Any) -> str:
    """What is wrong with the form of a record's `engine.evidence`; empty if nothing is."""
    names = ("sha256", "asked", "sent", "honoured")
    if not isinstance(note, dict) or set(note) != set(names):
        return f"must have {', '.join(names)}, is {quoted(note)}"
    for name in names[1:]:
        if not isinstance(note[name], dict):
            return f"has {name} {quoted(note[name])}, which is no object"
    if unknown := (set(note["asked"]) | set(note["honoured"])) - set(KINDS):
        return f"names {', '.join(sorted(map(str, unknown)))}, which is none of {', '.join(KINDS)}"
    if note["sha256"] is not None and not isinstance(note["sha256"], str):
        return f"has sha256 {quoted(note['sha256'])}"
    return ""
