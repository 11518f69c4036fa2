"""verl's multi-turn SFT Parquet, for `MultiTurnSFTDataset` of verl 0.6.1.

Source: utils/dataset/multiturn_sft_dataset.py. Its `tools` column would be a Parquet struct, in
which every tool gets the keys of all others as null, and the prompt would show them: the tools
stand in the system message instead. A given assistant message has `loss_mask` 0, which that dataset
honours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conversations.export.formats import ORIGIN, Format, Row, Source, origin
from conversations.export.text import TextView, TokensAndMask, UnreadableMessagesError
from conversations.export.writers import json_text, origin_columns, write_parquet
from conversations.extras import pyarrow
from conversations.rounds import is_sampled, last_sampled
from conversations.run.open_run import template_kwargs


def retokenised_blocks(messages: Sequence[Mapping[str, Any]], view: TextView) -> TokensAndMask:
    """The tokens of that dataset: each message adds those of the text that it adds to the
    rendering.

    Raises Refused.
    """
    assert view.template is not None
    encode = view.template.encode
    roles = [message["role"] for message in messages]
    _check_order(roles)
    ids: list[int] = []
    mask: list[int] = []
    before, index = "", 0
    while index < len(messages):
        end = _block_end(roles, index)
        now = view.render(messages[:end], generation=False)
        opened = (
            view.render(messages[:index], generation=True) if roles[index] == "assistant" else now
        )
        trained = messages[index].get("loss_mask")
        for text, own in ((opened[len(before) :], 0), (now[len(opened) :], 1)):
            piece = encode(text)
            ids += piece
            mask += [own if trained is None else trained] * len(piece)
        before, index = now, end
    return ids, mask


def _check_order(roles: Sequence[str]) -> None:
    start = roles[1:] if roles[0] == "system" else roles
    if start[:2] != ["user", "assistant"] or {"system", "developer"}.intersection(roles[1:]):
        raise UnreadableMessagesError(
            "it wants a system message only first, then user, then assistant"
        )


def _block_end(roles: Sequence[str], index: int) -> int:
    """The end of a block: a run of tool messages, or one other message."""
    end = index + 1
    while roles[index] == "tool" and end < len(roles) and roles[end] == "tool":
        end += 1
    return end


def _rows(source: Source) -> Iterator[Row]:
    view = source.view
    enable_thinking = template_kwargs(source.run.manifest).get("enable_thinking")
    for record in source.sequences():
        messages = [
            {
                **shown,
                "loss_mask": 0 if shown["role"] == "assistant" and not is_sampled(given) else None,
            }
            for shown, given in _aligned(view.messages(record), record["messages"])
        ]
        if not messages:
            source.leave_out("no sampled message")
        elif source.fits(record, retokenised_blocks, messages):
            more = {
                "tool_schemas": json_text(record["tools"]),
                **origin(record),
                "reward": record["reward"],
            }
            yield {"messages": messages, "enable_thinking": enable_thinking, **more}


def _aligned(
    shown: Sequence[dict[str, str]], given: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Pairs of a message as text and the record's own.

    The text may have one message more: a system message with the tools.
    """
    given = given[: last_sampled(given) + 1]
    return list(zip(shown, [{}] * (len(shown) - len(given)) + list(given), strict=True))


def _schema() -> Any:
    pa = pyarrow()
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("loss_mask", pa.int64())]
    )
    columns = [("messages", pa.list_(message)), ("enable_thinking", pa.bool_())]
    return pa.schema(
        [
            *columns,
            ("tool_schemas", pa.string()),
            *origin_columns(pa),
            ("reward", pa.float64()),
        ]
    )


VERL_SFT = Format(
    name="verl-sft",
    consumer="verl's MultiTurnSFTDataset",
    rows=_rows,
    write=write_parquet("train.parquet", _schema),
    unit="trajectory",
    fields={
        "messages": "role and content up to the last sampled message; tools stand in the system "
        "message, an assistant's content is as sampled; loss_mask is 0 for given assistant "
        "messages, else null",
        "enable_thinking": "as the run's config had it for its chat template, else null",
        "tool_schemas": "the tools offered, as JSON text; verl does not read it",
        **ORIGIN,
        "reward": "the trajectory's",
    },
    usage="data.train_files=train.parquet data.multiturn.enable=true "
    "data.multiturn.messages_key=messages",
)
