"""From a run to a page: one pass over the records, then a file, or a shell for a server.

Invariant: memory holds the summary, a few blocks and the token ids in use; it does not grow with
the conversations.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from conversations.advantages import SavedAdvantages
from conversations.branches import path_record
from conversations.errors import RecordError, RunFolderError
from conversations.page.blocks import Blocks, deflated
from conversations.page.html import shell
from conversations.page.pieces import pieces
from conversations.page.record import Record, Summary, shown_record, text_line, token_line
from conversations.run.hash_store import HashStore
from conversations.run.open_run import TOKENIZER, Run
from conversations.run.scores import SavedScores
from conversations.run.store import image_store
from conversations.run.whole_file import write_whole

LIMIT, MAX_BYTES = 20_000, 256 << 20
"""The default limits of a page on disk: trajectories, and bytes of their blocks."""


@dataclass(slots=True)
class Page:
    """A run prepared for the browser. `summary` and `pieces` are base64 of deflated JSON."""

    title: str
    summary: bytes
    pieces: bytes
    shown: int
    total: int
    blocks: Blocks = field(repr=False)

    def write(self, path: str | Path) -> int:
        """Writes the page as one file. Returns its bytes. Raises RunFolderError if it cannot be
        written.
        """
        try:
            return write_whole(Path(path), self._parts())
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}") from error

    def served(self, version: str) -> str:
        """The page for a server that has its blocks at `blocks/NUMBER?v=VERSION` beside it."""
        head, tail = shell(self.title, self.summary, self.pieces, version=version)
        return head + tail

    def _parts(self) -> Iterator[bytes]:
        head, tail = shell(self.title, self.summary, self.pieces)
        yield head.encode()
        for number, block in enumerate(self.blocks):
            yield b'<script type="text/plain" id="block-%d">%b</script>\n' % (number, block)
        yield tail.encode()

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.blocks.close()


class Readable(Protocol):
    """What a page needs of a run: its folder, its run.json, its records."""

    path: Path
    manifest: dict[str, Any]

    def __len__(self) -> int: ...

    def records(self, *, check: bool = True) -> Iterator[dict[str, Any]]: ...


def build(
    run: Readable,
    *,
    against: Run | None = None,
    limit: int | None = None,
    max_bytes: int | None = None,
) -> Page:
    """The first trajectories of `run`, each beside its counterpart in `against`, if it has one.

    All of them, or `limit`, or as many as fill `max_bytes` of blocks; a few blocks may come on top.
    A counterpart is the trajectory that the record's `parent` names, else the one of the same id.
    Close the page (or use `with`). Raises RunFolderError with file and line if a record cannot be
    read, RecordError if it has not the form of a record.
    """
    blocks = Blocks()
    try:
        summary, used, scores = Summary(), set[int](), SavedScores(run.path)
        advantages = SavedAdvantages(run.path)
        for record in run.records(check=False):
            if len(summary) == limit or (max_bytes is not None and blocks.size >= max_bytes):
                break
            other = _counterpart(record, against)
            stores = [image_store(one.path) if one else None for one in (run, against)]
            advantage = advantages.of(record)
            _add(record, other, stores, scores, advantage, summary, blocks, used)
        blocks.finish()
        return Page(
            run.path.resolve().name,
            _summary(run, against, summary),
            _pieces(run, used),
            len(summary),
            len(run),
            blocks,
        )
    except OSError as error:
        blocks.close()
        where = f"{tempfile.gettempdir()}, where its parts wait"
        raise RunFolderError(
            f"the page cannot be made in {where}: {error.strerror}; TMPDIR names another folder"
        ) from error
    except BaseException:
        blocks.close()
        raise


def _add(
    record: Record,
    other: Record | None,
    stores: Sequence[HashStore | None],
    scores: SavedScores,
    advantage: float | None,
    summary: Summary,
    blocks: Blocks,
    used: set[int],
) -> None:
    lines = []
    try:
        for one, store in zip((record, other), stores, strict=True):
            if one is None:
                continue
            differences = scores.differences(one) if one is record else None
            shown = shown_record(one)
            if advantage is not None and one is record:
                shown = {**shown, "advantage": advantage}
            lines += [text_line(shown, store), token_line(one, differences)]
            _use(used, one["prompt_ids"] + one["response_ids"])
        for number in range(1, len(record["branches"]) + 1):
            path = path_record(record, number)
            lines += [text_line(path, stores[0]), token_line(path)]
            _use(used, path["prompt_ids"] + path["response_ids"])
        differs = None if other is None else divergence(record, other)
        block, line = blocks.add(lines)
        summary.add(
            record, block=block, line=line, other=other and str(other["id"]), differs=differs
        )
    except (
        TypeError,
        LookupError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RecursionError,
        RecordError,
    ) as error:
        raise RecordError(
            f"trajectory {str(record['id'])[:80]} is damaged: {type(error).__name__}: {error}"
        ) from error


def _use(used: set[int], ids: list[int]) -> None:
    try:
        used.update(ids)
    except TypeError:  # not even hashable
        used.update(token for token in ids if isinstance(token, int))


def _counterpart(record: Record, against: Run | None) -> Record | None:
    if against is None:
        return None
    parent = record["parent"]
    name = parent.get("id") if isinstance(parent, dict) else None
    found = next(
        (one for one in (name, record["id"]) if isinstance(one, str) and one in against), None
    )
    return None if found is None else against.record(found, check=False)


def divergence(record: Record, other: Record) -> dict[str, int | None] | None:
    """The first token at which two records differ, None if they have the same tokens.

    `token` is its position, `turn` the record's generation that it lies in or after, None for the
    prompt. A sequence that ends earlier differs there.
    """
    ours, theirs = (one["prompt_ids"] + one["response_ids"] for one in (record, other))
    if ours == theirs:
        return None
    token = next(
        (place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    begun = sum(1 for turn in record["turns"] if turn["start"] <= token)
    return {"token": token, "turn": begun - 1 if begun else None}


def _summary(run: Readable, against: Run | None, summary: Summary) -> bytes:
    about = {
        "name": run.path.resolve().name,
        "against": against and against.path.resolve().name,
        "total": len(run),
        "manifest": run.manifest,
    }
    return deflated(
        json.dumps({**summary.document(), "run": about}, separators=(",", ":"), default=str)
    )


def _pieces(run: Readable, used: set[int]) -> bytes:
    return deflated(
        json.dumps(
            pieces(run.path / TOKENIZER / "tokenizer.json", used),
            ensure_ascii=False,
            separators=(",", ":"),
        )
    )
