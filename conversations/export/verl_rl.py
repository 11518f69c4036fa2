"""verl's RL Parquet for `RLHFDataset` (verl 0.6.1): the tasks of the trajectories, to roll out
again.

A row is the task as its task file had it: its messages, and every key that the record carries in
`extra`. `extra_info.turntrace` says how the run's samples of it did. Tools come from the trainer's
tool config, as in the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from conversations.export.formats import Format, Record, Row, Source
from conversations.export.tasks import first_of_each_task
from conversations.export.writers import write_shaped_parquet
from conversations.images.reading import png_url
from conversations.messages import content_text, image_parts
from conversations.rounds import given_length

_NOTE = (
    "a tool with empty kwargs has null in tools_kwargs: Parquet has no empty objects; "
    "fill them in before verl's own rollout reads it"
)


def _rows(source: Source) -> Iterator[Row]:
    for index, (record, rewards) in enumerate(first_of_each_task(source)):
        row = _row(record, rewards, index)
        if any(image_parts(given(record))):
            count = sum(1 for _ in image_parts(given(record)))
            if sum(one["content"].count("<image>") for one in row["prompt"]) != count:
                source.leave_out("a text that holds <image>, which stands for images in verl")
                continue
            row["images"] = [{"image": png_url(png)} for png in source.images(record)[:count]]
        kwargs = row["extra_info"].get("tools_kwargs")
        if _NOTE not in source.notes and isinstance(kwargs, dict) and not all(kwargs.values()):
            source.notes.append(_NOTE)
        yield row


def _row(record: Record, rewards: Mapping[str, Any], index: int) -> Row:
    extra = record["extra"] if isinstance(record["extra"], dict) else {}
    info = _mapping(extra.get("extra_info"))
    source = record["data_source"]
    return {
        "id": record["task_id"],
        **{
            key: value
            for key, value in extra.items()
            if key not in ("tools_kwargs", "interaction_kwargs")
        },
        "data_source": source if isinstance(source, str) else "unknown",
        "prompt": [_message(message) for message in given(record)],
        "reward_model": {
            "style": "rule",
            **_mapping(extra.get("reward_model")),
            "ground_truth": record["ground_truth"],
        },
        "extra_info": {
            "index": index,
            **info,
            **{key: extra[key] for key in ("tools_kwargs", "interaction_kwargs") if key in extra},
            **(
                {"need_tools_kwargs": True}
                if info.get("tools_kwargs") or extra.get("tools_kwargs")
                else {}
            ),
            "turntrace": {"task_id": record["task_id"], **rewards},
        },
    }


def given(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The task's own messages."""
    messages: list[dict[str, Any]] = record["messages"]
    length = given_length(messages, record["tools"], record["segments"], len(record["prompt_ids"]))
    return messages[:length]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key != "raw"}
    return {**kept, "content": content_text(kept["content"])}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


VERL_RL = Format(
    name="verl-rl",
    consumer="verl's RLHFDataset",
    rows=_rows,
    write=write_shaped_parquet("train.parquet"),
    unit="task",
    fields={
        "id": "the task's id in the run; `turntrace run` keeps it, verl does not read it",
        "prompt": "the task's messages",
        "data_source, reward_model.ground_truth": "as the task had them",
        "extra_info": "the task's own, tools_kwargs included; turntrace: its task_id, how many "
        "samples were exported, their mean reward",
        "images": "data URLs of the prompt's images, one for each <image> in it, in order",
        "(others)": "every other key of the task's row",
    },
    usage="data.train_files=train.parquet data.return_raw_chat=true",
    takes_images=True,
)
