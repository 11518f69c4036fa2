"""What the tests of the page share: runs out of changed records, and a page read back as a
browser reads it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from conversations.page import build
from conversations.run.open_run import open_run
from conversations.run.store import RUN, TRAJECTORIES
from conversations.trajectory import record_hash

Record = dict[str, Any]


def write_run(path: Path, like: Path, records: Iterable[Record]) -> Path:
    """A run folder of its own with these records, their hashes made right; manifest and
    tokenizer are those of `like`."""
    path.mkdir(parents=True)
    shutil.copy(like / RUN, path / RUN)
    shutil.copytree(like / "tokenizer", path / "tokenizer")
    with (path / TRAJECTORIES).open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps({**record, "sha256": record_hash(record)}) + "\n")
    return path


def changed_run(path: Path, like: Path, change: Callable[[int, Record], None]) -> Path:
    """`like` again, each record passed through `change`."""
    records = list(open_run(like).records())
    for number, record in enumerate(records):
        change(number, record)
    return write_run(path, like, records)


def write_page(run: Path, out: Path, against: Path | None = None, limit: int | None = None) -> Path:
    """The page of a run, on disk."""
    with build(
        open_run(run), against=None if against is None else open_run(against), limit=limit
    ) as page:
        page.write(out)
    return out


def inflated(packed: str | bytes) -> str:
    """What a block of a page says."""
    return zlib.decompress(base64.b64decode(packed)).decode()


def parts_of(html: str) -> tuple[dict[str, Any], dict[str, Any], list[list[str]]]:
    """A page's summary, its pieces, and the lines of its blocks."""
    found = dict(
        re.findall(r'<script type="text/plain" id="([a-z0-9-]+)">([A-Za-z0-9+/=]*)</script>', html)
    )
    summary, known = (json.loads(inflated(found.pop(name))) for name in ("summary", "pieces"))
    return (
        summary,
        known,
        [inflated(found[f"block-{number}"]).split("\n") for number in range(len(found))],
    )


def records_of(html: str) -> list[Record]:
    """The records of a page, whole again but for what a page leaves out."""
    summary, _, blocks = parts_of(html)
    places = zip(summary["columns"]["block"], summary["columns"]["line"], strict=True)
    return [_record(blocks[block][line], blocks[block][line + 1]) for block, line in places]


def _record(text: str, tokens: str) -> Record:
    record = {**json.loads(text), **json.loads(tokens)}
    packed = record.pop("logprobs")
    if isinstance(packed, dict):
        (code, data), *_ = packed.items()
        packed = [
            None if value != value else value
            for value in array({"f32": "f", "f64": "d"}[code], base64.b64decode(data))
        ]
    return {**record, "response_logprobs": packed}
