"""One record as the page keeps it: a row of the summary, a line of text and a line of tokens.

Invariant: nothing is lost silently: texts are cut only in a record over `RECORD_LIMIT`, and the cut
names the whole length; log-probs keep every bit (as float32 if they fit).
"""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import index
from typing import Any

from conversations.branches import branch_tree
from conversations.errors import RunFolderError
from conversations.images.reading import png_url
from conversations.messages import content_text
from conversations.run.hash_store import HashStore
from conversations.trajectory import CALL_STATUSES, STOP_REASONS

TOKEN_FIELDS = ("prompt_ids", "response_ids", "response_mask", "segments")
RECORD_LIMIT = 32 << 20
"""Characters of JSON that a record may have before its long texts are cut."""
TEXT_LIMIT = 1 << 20
"""Characters that a text of such a record keeps."""
PICTURE_BYTES = 4 << 20
"""Of an image's file that a page holds; the page names a larger one only."""
PREVIEW = 160
STATUSES = 40
"""The number of statuses that fit the bits of a row, which JavaScript keeps as a number."""

Record = Mapping[str, Any]


@dataclass(slots=True)
class Summary:
    """The run by columns: one value a trajectory, and in `calls` one a tool call.

    Names are replaced by their place in `names`.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    calls: dict[str, list[Any]] = field(
        default_factory=lambda: {"row": [], "tool": [], "status": [], "run_s": []}
    )
    names: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            "task": {},
            "stop": {name: place for place, name in enumerate(STOP_REASONS)},
            "status": {name: place for place, name in enumerate(CALL_STATUSES)},
            "tool": {},
        }
    )

    def __len__(self) -> int:
        return len(self.columns.get("id", ()))

    def add(self, record: Record, **more: Any) -> None:
        """A record's row; `more` are further columns."""
        row = {**_row(record), **more}
        calls = [
            (str(call["name"]), str(call["status"]), _ran(call)) for call in record["tool_calls"]
        ]
        statuses = 0
        for name, status, run_s in calls:
            place = self._place("status", status)
            statuses |= 1 << place
            for key, value in (
                ("row", len(self)),
                ("tool", self._place("tool", name)),
                ("status", place),
                ("run_s", run_s),
            ):
                self.calls[key].append(value)
        row |= {
            "task": self._place("task", row["task"]),
            "stop": self._place("stop", row["stop"]),
            "statuses": statuses,
        }
        for key, value in row.items():
            self.columns.setdefault(key, []).append(value)

    def document(self) -> dict[str, Any]:
        """The summary as JSON has it: names as lists."""
        return {
            "columns": self.columns,
            "calls": self.calls,
            "names": {kind: list(places) for kind, places in self.names.items()},
        }

    def _place(self, kind: str, name: str) -> int:
        places = self.names[kind]
        if kind == "status" and len(places) == STATUSES and name not in places:
            name = "cancelled"  # no run of ours has so many
        return places.setdefault(name, len(places))


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": str(record["id"]),
        "task": str(record["task_id"]),
        "sample": index(record["sample"]),
        "stop": str(record["stop_reason"]),
        "reward": _number(record["reward"]),
        "turns": index(record["num_turns"]),
        "prompt": len(record["prompt_ids"]),
        "response": len(record["response_ids"]),
        "sampled": record["response_mask"].count(1),
        "calls": len(record["tool_calls"]),
        "branches": len(record["branches"]),
        "infra": int(bool(record["infra_error"])),
        "warnings": len(record["warnings"]),
        "wall": _number(record["wall_s"]),
        "preview": _preview(record["messages"]),
    }


def _ran(call: Record) -> float | None:
    """The seconds that a call ran, None if it was never attempted."""
    return _number(call["run_s"]) if call["attempts"] else None


def _number(value: Any) -> float | None:
    """A finite number to six digits, as lists and plots show it; None otherwise."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _preview(messages: list[Record]) -> str:
    asked = next((message for message in messages if message.get("role") == "user"), {})
    content = asked.get("content", "")
    text = content_text(content) if isinstance(content, list) else str(content)
    return " ".join(text[: 4 * PREVIEW].split())[:PREVIEW]


def shown_record(record: Record) -> Record:
    """The record with its branches as a tree: each has lines of its own after the record's."""
    if not record["branches"]:
        return record
    return {**record, "branches": [asdict(line) for line in branch_tree(record)]}


def text_line(record: Record, store: HashStore | None = None) -> str:
    """All of the record except its tokens, on one JSON line.

    `pictures` are its images by hash, as data URLs, as far as `store` has them whole.
    """
    kept = {
        key: value
        for key, value in record.items()
        if key not in TOKEN_FIELDS and key != "response_logprobs"
    }
    text = _dumps(kept)
    if len(text) > RECORD_LIMIT:
        text = _dumps(_cut(json.loads(text)))
    pictures = {} if store is None else _pictures(record, store)
    return f'{text[:-1]},"pictures":{_dumps(pictures)}}}' if pictures else text


def _pictures(record: Record, store: HashStore) -> dict[str, str]:
    """The images that the record names; one that is missing, changed or too large is left out."""
    named = [str(image["sha256"]) for image in record.get("images", ())]
    named += [str(sha256) for call in record["tool_calls"] for sha256 in call.get("images", ())]
    found: dict[str, str] = {}
    for sha256 in dict.fromkeys(named):
        with suppress(RunFolderError):
            png = store.read(sha256, most=PICTURE_BYTES)
            found[sha256] = png_url(png)
    return found


def token_line(record: Record, differences: list[float | None] | None = None) -> str:
    """Ids, mask, segments and log-probs, on one JSON line.

    `differences` are those of the log-probs to an engine's; see `conversations.run.scores`.
    """
    scored = {} if differences is None else {"differences": _packed(differences)}
    return _dumps(
        {
            **{key: record[key] for key in TOKEN_FIELDS},
            "logprobs": _packed(record["response_logprobs"]),
            **scored,
        }
    )


def _packed(values: list[float | None]) -> Any:
    """Log-probs as base64 of little-endian bytes, NaN for null.

    {"f32": ...} if that keeps every bit, else {"f64": ...}. A value that is no list of numbers is
    returned as it is.
    """
    try:
        exact = array("d", [math.nan if value is None else value for value in values])
        single = array("f", exact)
    except (TypeError, OverflowError):
        return values
    lossless = array("d", single).tobytes() == exact.tobytes()
    kept = single if lossless else exact
    return {"f32" if lossless else "f64": base64.b64encode(kept.tobytes()).decode()}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return (
            value
            if len(value) <= TEXT_LIMIT
            else f"{value[:TEXT_LIMIT]}\n"
            f"[cut in this page: {TEXT_LIMIT} of {len(value)} characters]"
        )
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return {key: _cut(item) for key, item in value.items()} if isinstance(value, dict) else value


def _dumps(value: Any) -> str:
    """One line of JSON that is UTF-8 and that browsers read.

    Lone surrogates are escaped; NaN and infinities become their names.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return _dumps(_finite(value))
    return text if text.isascii() or _has_utf8(text) else json.dumps(value, separators=(",", ":"))


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
