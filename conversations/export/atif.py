"""ATIF v1.8, one document a line. `conversations.atif` maps the fields, both ways."""

from __future__ import annotations

from collections.abc import Iterator

from conversations.atif import document
from conversations.export.formats import Format, Row, Source
from conversations.export.writers import write_json_lines


def _rows(source: Source) -> Iterator[Row]:
    return map(document, source)


ATIF = Format(
    name="atif",
    consumer="ATIF v1.8 readers",
    rows=_rows,
    write=write_json_lines("trajectories.jsonl", exact=True),
    unit="trajectory",
    fields={
        "steps[].metrics": "for each generation exactly prompt_token_ids (all the engine saw), "
        "completion_token_ids and logprobs",
        "steps[].extra.turntrace, tool_calls[].extra.turntrace": "a message's raw text, "
        "a malformed call, a call's ledger line",
        "extra.turntrace": "response_mask, segments, rewards and the rest of the record; "
        "`turntrace import` restores it unchanged",
    },
    usage="one ATIF document a line; `split -l 1` makes files of them",
)
