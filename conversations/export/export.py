"""What an export did: everything that its card says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.export.filters import Filters
from conversations.export.formats import Format
from conversations.export.groups import Statistics


@dataclass(frozen=True, slots=True)
class Export:
    """The counts and files of one export.

    `dropped` counts the trajectories that filters left out, by reason, `left_out` those that have
    no place in the format. `verdicts` counts what a consumer gets out of texts (`text.VERDICTS`);
    `differing` names the first trajectory of each. `files` is SHA-256 and size in bytes by name.
    """

    format: Format
    run: Path
    manifest: Mapping[str, Any]
    run_files: Mapping[str, str]
    command: str
    filters: Filters
    rows: int
    whole: Statistics
    kept: Statistics
    dropped: Counter[str]
    left_out: Counter[str]
    verdicts: Counter[str]
    differing: Mapping[str, str]
    notes: list[str]
    files: Mapping[str, tuple[str, int]]
