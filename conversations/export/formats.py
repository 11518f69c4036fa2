"""What a format is, and the list of them: a function from records to rows, and a writer of rows.

A format reads its `Source` once, front to back, and keeps no more than a few numbers a trajectory.
It reports there what it cannot hold: `leave_out` for a record without a place in it, `count` for
what a consumer would make of a text (`text.VERDICTS`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.branches import sequence_records
from conversations.errors import ConversationsError, ExportError
from conversations.export.text import TextView, TokensAndMask, UnreadableMessagesError, verdict
from conversations.images.sources import hash_of
from conversations.messages import image_parts
from conversations.run.open_run import Run, template_kwargs

TRUNK, ALL = "trunk", "all"
"""What `--branches` may be."""
Record = dict[str, Any]
Row = dict[str, Any]


@dataclass(slots=True)
class Source:
    """The selected records of a run. Iterate once.

    `batch_size` is for `dataproto`: rows in one file. `branches` is for formats with a row for each
    sequence: "all", or "trunk" for the session's main one alone.
    """

    run: Run
    selected: Iterable[Record]
    batch_size: int = 256
    branches: str = ALL
    left_out: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    differing: dict[str, str] = field(default_factory=dict)
    """The first id with each verdict but "same"."""
    notes: list[str] = field(default_factory=list)
    takes_images: bool = False
    """Whether the format has a place for images; if not, records with images are left out."""
    _view: TextView | None = None

    def __iter__(self) -> Iterator[Record]:
        for record in self.selected:
            if self.takes_images or not any(image_parts(record["messages"])):
                yield record
            else:
                self.leave_out(
                    "images, which this format has no place for (dataproto, verl-rl, openai and "
                    "parquet have)"
                )

    def images(self, record: Record) -> list[bytes]:
        """A record's images as PNG files, in the order of its messages.

        Raises ExportError if one is not there or was changed.
        """
        try:
            return [
                self.run.image(hash_of(part["image"])) for part in image_parts(record["messages"])
            ]
        except ConversationsError as error:
            raise ExportError(f"trajectory {record['id']}: {error}") from error

    def sequences(self) -> Iterator[Record]:
        """A record for each sequence, with its number as `branch` and the branch's `reason`.

        In the record of a branch, its parents' turns are given: each token is trained once.
        """
        for record in self:
            yield from sequence_records(record, with_branches=self.branches == ALL)

    def with_ids(self) -> Iterator[Record]:
        """The sequences with sampled tokens; the others are left out."""
        for record in self.sequences():
            if record["turns"]:
                yield record
            else:
                self.leave_out("no sampled tokens")

    def leave_out(self, reason: str) -> None:
        """Counts a selected record that has no place in the format."""
        self.left_out[reason] += 1

    def fits(self, record: Record, retokenise: Callable[..., TokensAndMask], *texts: Any) -> bool:
        """Counts what the consumer makes of a record's texts. False, and left out, if it refuses
        them.
        """
        name = self._verdict(record, retokenise, texts)
        self.count(name, record)
        if name == "refused":
            self.leave_out("refused by the consumer's code or the chat template")
        return name != "refused"

    def count(self, name: str, record: Record) -> None:
        """Counts one of `VERDICTS`."""
        self.verdicts[name] += 1
        if name != "same":
            self.differing.setdefault(name, record["id"])

    def _verdict(
        self, record: Record, retokenise: Callable[..., TokensAndMask], texts: tuple[Any, ...]
    ) -> str:
        template = self.view.template
        if template is None or not record["turns"]:
            return "not checked"
        try:
            tokens = retokenise(*texts, self.view)
        except UnreadableMessagesError:
            return "refused"
        return verdict(record, tokens, template)

    @property
    def view(self) -> TextView:
        """Records as text, by the run's own chat template."""
        if self._view is None:
            self._view = TextView(self._template(), template_kwargs(self.run.manifest))
        return self._view

    def _template(self) -> Any:
        try:
            return self.run.template()
        except ConversationsError as error:
            self.notes.append(
                "tools are in no system message and nothing was checked, "
                f"because the run's chat template cannot be used: {error}"
            )
            return None


ORIGIN = {
    "id": "the trajectory in the run",
    "branch, reason": "the sequence of the session: 0 and null for its trunk; else the branch's "
    "number and why it is one. Its parents' turns are not trained in it",
}
"""What the fields of `origin` say, for a card."""


def origin(record: Mapping[str, Any]) -> Row:
    """Where a row of `Source.sequences` comes from."""
    return {"id": record["id"], "branch": record["branch"], "reason": record["reason"]}


Writer = Callable[[Iterator[Row], Path], int]
"""Writes rows into a folder, returns how many."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format of `--to`. `fields` documents its rows, `usage` how the consumer loads them."""

    name: str
    consumer: str
    rows: Callable[[Source], Iterator[Row]]
    write: Writer
    unit: str
    """What a row is: a trajectory, a task, a pair, a batch."""
    fields: Mapping[str, str]
    usage: str
    takes_images: bool = False


def export_names() -> tuple[str, ...]:
    """The names of the formats, in the order to show them."""
    return tuple(_modules())


def get_format(name: str) -> Format:
    """The format of that name. Raises ExportError if there is none."""
    from importlib import import_module

    if name not in _modules():
        raise ExportError(
            f"there is no format {name!r}; the formats are {', '.join(export_names())}"
        )
    found = getattr(
        import_module(f"conversations.export.{_modules()[name]}"), name.replace("-", "_").upper()
    )
    assert isinstance(found, Format)
    return found


@functools.cache
def _modules() -> dict[str, str]:
    """Each format's module; it is imported on first use."""
    return {
        "verl-rl": "verl_rl",
        "verl-sft": "verl_sft",
        "dataproto": "dataproto",
        "trl-sft": "trl",
        "trl-preference": "trl",
        "openrlhf-sft": "openrlhf",
        "openrlhf-prompts": "openrlhf",
        "openrlhf-preference": "openrlhf",
        "sharegpt": "sharegpt",
        "atif": "atif",
        "openai": "openai",
        "rows": "rows",
        "parquet": "record",
    }
