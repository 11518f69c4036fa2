"""Records of the schema before this one, `turntrace/1`, read in today's form.

A `turntrace/1` line has no `branches`, and its `warnings` are texts; a line of either schema has
`images` only if there are any. Only this file knows that.
Invariant: `as_written(upgraded(record)) == record`, so the hash of an old line can be checked in
either form. `schema` and `sha256` stay those of the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from conversations.errors import RecordError
from conversations.warning import WarningKind

SCHEMA = "turntrace/2"
OLD_SCHEMA = "turntrace/1"
READABLE = (SCHEMA, OLD_SCHEMA)

_STEPS = "start_interaction|generate_response|finalize_interaction"
_IMPORTED = (
    r"ATIF has no stop reason: .*",
    r"some generations have no log-probs: .*",
    r"log-probs were no float32: .*",
    r"raw is the message's text, .*",
    r"the calls of a message are ATIF's, .*",
    r"between two turns all tokens are counted to tool or user: .*",
    r"parts that are not text were left out",
    r"the steps have no timestamps: .*",
    r"the ledger is made from ATIF's calls and observations: .*",
    r"imported without token ids, mask and log-probs: .*",
    r"imported from a verl rollout dump, .*",
    r"the ATIF document was changed after turntrace wrote it: .*",
)
_TEXTS: dict[WarningKind, tuple[str, ...]] = {
    "control_tokens": (r"the response of \S+ holds control tokens as text: .*",),
    "history_rewritten": (
        r"the chat template drops earlier <think> blocks; the sampled tokens were kept",
    ),
    "unknown_ids": (r"the model sampled ids that the tokenizer does not have: .*",),
    "unknown_tool_kwargs": (r"tools_kwargs names .*, which is not a tool of this run",),
    "release_failed": (r"tool .*: release failed: .*",),
    "user_failed": (rf"interaction .*: (?:{_STEPS}) (?:failed: .*|took more than \S+ s)",),
    "over_sampled": (r"cut off when \d+ conversations were done \(over_sample_rate\)",),
    "resumed": (r"gone on with from token \d+, where it was cut off",),
    "tools_differ": (r"gone on with: .* answered otherwise when its calls were made again",),
    "user_differs": (r"the user, asked again, answers turn \d+ otherwise than recorded; .*",),
    "imported": _IMPORTED,
}
"""Every warning that a version with `turntrace/1` wrote."""

_PATTERNS = {kind: re.compile("|".join(texts), re.DOTALL) for kind, texts in _TEXTS.items()}


def check_schema(value: object) -> dict[str, Any]:
    """A record line's value, if it is an object of a schema in `READABLE`. Raises RecordError."""
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if not isinstance(value, dict) or found not in READABLE:
        raise RecordError(f"schema is {found!r:.60}, expected one of {', '.join(READABLE)}")
    return value


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """A record line's object in the form of `SCHEMA`. Raises RecordError."""
    if record["schema"] == SCHEMA:
        return record if "images" in record else {**record, "images": []}
    if "branches" in record or "images" in record:
        raise RecordError(f"the fields branches, images are not known in a {OLD_SCHEMA} record")
    return {**record, "branches": [], "images": [], "warnings": _warnings(record)}


def as_written(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record as its own schema writes it: what `upgraded` was given."""
    if not record.get("images"):
        record = {key: value for key, value in record.items() if key != "images"}
    if record.get("schema") != OLD_SCHEMA:
        return record
    kept = [warning for warning in record["warnings"] if warning["kind"] != "partial"]
    old = {key: value for key, value in record.items() if key != "branches"}
    return {**old, "warnings": [warning["text"] for warning in kept]}


def _warnings(record: Mapping[str, Any]) -> Any:
    texts = record.get("warnings")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"warnings are not a list of texts, as {OLD_SCHEMA} has them")
    warnings = [{"kind": _kind(text), "text": text} for text in texts]
    if _is_partial(record):
        warnings.append({"kind": "partial", "text": "parts that have no JSON form were left out"})
    return warnings


def _kind(text: str) -> WarningKind:
    return next((kind for kind, one in _PATTERNS.items() if one.fullmatch(text)), "other")


def _is_partial(record: Mapping[str, Any]) -> bool:
    """Whether the conversation had no JSON form. An old record says so in `error` alone."""
    error = record.get("error")
    unwritable = f"trajectory {record.get('id')} cannot be written as JSON"
    return bool(
        record.get("infra_error") and isinstance(error, str) and error.startswith(unwritable)
    )
