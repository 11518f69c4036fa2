"""OpenAI chat messages, images included, one conversation a line; TRL reads them as well.

Images are `image_url` parts with data URLs, so a row needs no other file. A sampled turn has its
calls as `tool_calls` and its text as `content`; the exact text is `raw` of the record, which this
format has no place for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conversations.export.formats import Format, Record, Row, Source
from conversations.export.writers import write_json_lines
from conversations.images.reading import png_url
from conversations.rounds import last_sampled

_OURS = ("raw", "malformed", "written_id")


def _rows(source: Source) -> Iterator[Row]:
    for record in source:
        messages = record["messages"][: last_sampled(record["messages"]) + 1]
        if not messages:
            source.leave_out("no sampled message")
            continue
        images = iter(source.images(record))
        yield {
            "id": record["id"],
            "messages": [_message(message, images) for message in messages],
            "tools": record["tools"],
            "reward": record["reward"],
        }


def _message(message: Record, images: Iterator[bytes]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key not in _OURS}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_part(part, images) for part in kept["content"]]
    if "tool_calls" in kept:
        kept["tool_calls"] = [
            {key: value for key, value in call.items() if key not in _OURS}
            for call in kept["tool_calls"]
        ]
    return kept


def _part(part: dict[str, Any], images: Iterator[bytes]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": png_url(next(images))}}


OPENAI = Format(
    name="openai",
    consumer="anything that reads OpenAI chat messages",
    rows=_rows,
    write=write_json_lines("train.jsonl"),
    unit="trajectory",
    fields={
        "messages": "OpenAI chat messages up to the last sampled one, images as image_url parts",
        "tools": "the tools offered, OpenAI schemas",
        "id, reward": "the trajectory in the run, and its reward",
    },
    usage='datasets.load_dataset("json", data_files="train.jsonl", split="train")',
    takes_images=True,
)
