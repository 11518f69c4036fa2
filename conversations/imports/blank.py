"""An empty record, and how an import says that a source lacks something."""

from __future__ import annotations

import math
from typing import Annotated, Any, get_origin

from conversations.errors import ImportFileError
from conversations.trajectory import FIELD_TYPES

EPOCH = "1970-01-01T00:00:00+00:00"
"""`started_at` if the source has no time."""


def blank(task_id: str, sample: int) -> dict[str, Any]:
    """The fields of a record without tokens, messages and reward."""
    empty = {name: _empty(kind) for name, kind in FIELD_TYPES.items()}
    name = {"id": f"{task_id}-{sample}", "task_id": task_id, "sample": sample}
    return {**empty, **name, "stop_reason": "stop", "started_at": EPOCH}


def _empty(kind: Any) -> Any:
    """The empty value of a field's type, None if it may be null."""
    bare = get_origin(kind) or kind
    if bare is Annotated:
        return _empty(kind.__origin__)
    return bare() if bare in (list, dict, int, float, bool, str) else None


def reward_fields(value: Any, what: str) -> dict[str, Any]:
    """`reward` and `reward_parts` of a number or null. Raises ImportFileError for anything else."""
    if value is None:
        return {"reward": None, "reward_parts": {}}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ImportFileError(f"{what} is {value!r:.60}, expected a finite number")
    return {"reward": float(value), "reward_parts": {"imported": float(value)}}
