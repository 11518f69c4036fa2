"""One line of a run, checked: from its bytes to its findings.

Invariant: no line raises and none is skipped; what cannot be checked is a finding.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from conversations.branches import Totals, last_of_conversation, path_of
from conversations.checks.branches import branch_findings
from conversations.checks.evidence import evidence_findings
from conversations.checks.facts import RunFacts
from conversations.checks.finding import Finding, differs, quoted
from conversations.checks.images import image_findings
from conversations.checks.outcome import outcome_findings
from conversations.checks.sequence import sequence_findings
from conversations.checks.shape import shape_findings
from conversations.errors import RecordError
from conversations.rounds import given_length, split_rounds
from conversations.run.open_run import ID
from conversations.trajectory import Trajectory, canonical_json, line_hash
from conversations.upgrade import check_schema, upgraded

GROUP_FIELDS = ("prompt", "tools", "ground_truth", "data_source", "extra")
"""What the samples of a task share, each with its own digest in `LineResult.common`."""
_DIGEST = 8


@dataclass(slots=True)
class LineResult:
    """The result of one line.

    `id` is None if the line has none. `key` is (task, sample) and `common` the digests of
    `GROUP_FIELDS`, if the record could be read. `tally` counts what run.json counts; `sha256` is
    the hash that the record carries. `partial` means that it is of a failure and holds only parts
    of its conversation, `unproven` that it is an import whose messages do not match its tokens.
    """

    findings: list[Finding] = field(default_factory=list)
    id: str | None = None
    key: tuple[str, int] | None = None
    common: bytes = b""
    tally: Counter[str] = field(default_factory=Counter)
    reward: float | None = None
    sha256: str = ""
    partial: bool = False
    unproven: bool = False


def check_line(line: bytes, facts: RunFacts, *, finished: bool = True) -> LineResult:
    """All checks of one record. `finished` is False for a conversation that was interrupted."""
    result = LineResult(id=_id_in(line))
    try:
        found = _parsed(line)
        result.id = found["id"] if isinstance(found.get("id"), str) else None
        result.findings += hash_findings(found)
        record = upgraded(found)
        if shape := list(shape_findings(record)):
            result.findings += shape
            return result
        trajectory = Trajectory.from_record(record)
    except (RecordError, RecursionError) as error:
        result.findings.append(Finding(str(error)))
        return result
    result.key, result.reward, result.sha256 = (
        (trajectory.task_id, trajectory.sample),
        trajectory.reward,
        record["sha256"],
    )
    result.partial = _is_partial(trajectory)
    result.unproven = _is_unproven(trajectory, facts)
    result.findings += _under_its_start(trajectory, facts, finished, result.partial)
    if facts.folder is not None:
        result.findings += evidence_findings(trajectory, facts.folder)
    result.common = b"" if result.partial or facts.is_gateway else _common(trajectory)
    _count(trajectory, result.tally)
    return result


def _under_its_start(
    trajectory: Trajectory, facts: RunFacts, finished: bool, partial: bool
) -> list[Finding]:
    """What is wrong under the start that made the record: the one with which least is wrong.

    A resumed conversation may have run under several starts.
    """
    starts = [facts, *reversed(facts.earlier)]
    if facts.earlier and any(one.kind == "resumed" for one in trajectory.warnings):
        starts.append(facts.loosened())
    best: list[Finding] | None = None
    for start in starts:
        found = list(_trajectory_findings(trajectory, start, finished=finished, partial=partial))
        if best is None or len(found) < len(best):
            best = found
        if not found:
            break
    return best or []


def hash_findings(record: dict[str, Any]) -> Iterator[Finding]:
    """A finding if the record is not what was written."""
    try:
        expected = line_hash(record)
    except (ValueError, RecursionError) as error:
        yield Finding(f"it has no canonical JSON, and so no hash: {error}")
        return
    if record.get("sha256") != expected:
        found = str(record.get("sha256"))
        yield Finding(
            differs(
                "the record does not match its hash: it was changed after it was written",
                found[:16],
                expected[:16],
            )
        )


def _trajectory_findings(
    trajectory: Trajectory, facts: RunFacts, *, finished: bool, partial: bool
) -> Iterator[Finding]:
    parts = split_rounds(trajectory.messages)
    is_text_checked = not partial and not _is_unproven(trajectory, facts)
    yield from sequence_findings(
        trajectory,
        parts,
        facts,
        with_text=is_text_checked,
        is_compacted=last_of_conversation(trajectory) > 0,
    )
    if is_text_checked:
        yield from image_findings(trajectory, facts)
    if facts.template is not None and facts.imported is None:
        found, expected = trajectory.sampling.get("stop_token_ids"), facts.template.stop_token_ids
        if found != expected and not partial:
            yield Finding(differs("sampling.stop_token_ids", found, expected))
    yield from outcome_findings(trajectory, _last(trajectory), facts, finished=finished)
    if trajectory.branches and not partial:
        yield from branch_findings(trajectory, facts, with_text=is_text_checked)


def _last(trajectory: Trajectory) -> Trajectory:
    """The sequence that a conversation ended with: the last one after compactions."""
    try:
        number = last_of_conversation(trajectory)
        return path_of(trajectory, number) if trajectory.branches else trajectory
    except (RecordError, LookupError):  # `branch_findings` says so
        return trajectory


def _is_partial(trajectory: Trajectory) -> bool:
    """Whether the record is of a failure and holds only those parts that have a JSON form."""
    return trajectory.infra_error and any(one.kind == "partial" for one in trajectory.warnings)


def _is_unproven(trajectory: Trajectory, facts: RunFacts) -> bool:
    """Whether the record was imported and says itself that tokens and messages do not match."""
    return facts.imported is not None and any(one.kind == "unproven" for one in trajectory.warnings)


# ---------------------------------------------------------------------- JSON


def _parsed(line: bytes) -> dict[str, Any]:
    """The line as a dict.

    Raises RecordError if it is not one JSON object in UTF-8 with unique keys and finite numbers.
    """
    if not line.strip():
        raise RecordError("the line is blank")
    try:
        record = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a JSON line: {' '.join(str(error).split())[:200]}") from error
    return check_schema(record)


def _id_in(line: bytes) -> str | None:
    """The id of a line that may be no JSON, if it can be found."""
    found = ID.findall(line)
    try:
        return str(json.loads(found[0])) if len(found) == 1 else None
    except ValueError:
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object. Readers differ in what a repeated key means."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError(f"the key {quoted(twice)} stands twice in one object")
    return values


def _constant(text: str) -> None:
    raise RecordError(f"the line holds {text}, which is no JSON number")


# ---------------------------------------------------------------------- for the run as a whole


def _common(trajectory: Trajectory) -> bytes:
    """Digests of what all samples of the task must share, `_DIGEST` bytes each."""
    given = given_length(
        trajectory.messages, trajectory.tools, trajectory.segments, len(trajectory.prompt_ids)
    )
    values = (
        trajectory.messages[:given],
        trajectory.tools,
        trajectory.ground_truth,
        trajectory.data_source,
        trajectory.extra,
    )
    return b"".join(
        hashlib.blake2b(canonical_json(value).encode("ascii"), digest_size=_DIGEST).digest()
        for value in values
    )


def differing_fields(one: bytes, two: bytes) -> list[str]:
    """The names of `GROUP_FIELDS` in which two records' `common` differ."""
    return [
        name
        for i, name in enumerate(GROUP_FIELDS)
        if one[i * _DIGEST : (i + 1) * _DIGEST] != two[i * _DIGEST : (i + 1) * _DIGEST]
    ]


def _count(trajectory: Trajectory, tally: Counter[str]) -> None:
    totals = Totals.of(trajectory)
    tally["done"] += 1
    tally[f"stop_reasons.{trajectory.stop_reason}"] += 1
    for name in ("turns", "tokens", "sampled_tokens", "tool_calls", "tool_errors", "invalid_calls"):
        tally[name] += getattr(totals, name)
    tally["branches"] += len(trajectory.branches)
    tally["infra_errors"] += trajectory.infra_error
