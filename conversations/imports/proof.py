"""Makes sure that `verify` accepts what an import writes: checks each record before it is written.

A source may not have all that `verify` compares. If only messages and tokens do not match, the
record is kept with a warning of the kind `unproven`. Anything else is a defect of the source.
"""

from __future__ import annotations

import dataclasses

from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from conversations.errors import ImportFileError
from conversations.trajectory import Trajectory
from conversations.warning import RecordWarning

MAX_SHOWN = 10


def proven(trajectory: Trajectory, facts: RunFacts) -> Trajectory:
    """The trajectory, with a warning if its messages could not be compared with its tokens.

    Raises ImportFileError with a line for each of the first `MAX_SHOWN` things that are wrong.
    """
    findings = _findings(trajectory, facts)
    if not findings:
        return trajectory
    warning = RecordWarning("unproven", f"tokens and messages do not match: {findings[0]}")
    marked = dataclasses.replace(trajectory, warnings=[*trajectory.warnings, warning])
    if left := _findings(marked, facts):
        raise ImportFileError("\n".join(left[:MAX_SHOWN]))
    return marked


def _findings(trajectory: Trajectory, facts: RunFacts) -> list[str]:
    line = trajectory.to_line().encode("ascii") + b"\n"
    return [finding.what for finding in check_line(line, facts).findings]
