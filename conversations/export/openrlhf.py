"""OpenRLHF 0.11, JSON Lines for its `datasets/`: SFT, prompts to roll out again, preference pairs.

Its datasets hold only text. SFT is for `multiturn` with the chat template: `SFTDataset` gives a
loss range to each assistant message. Prompts and pairs are rendered already and need no chat
template.
"""

from __future__ import annotations

from collections.abc import Iterator

from conversations.errors import ExportError
from conversations.export.formats import ORIGIN, Format, Row, Source, origin
from conversations.export.pairs import FIELDS, pairs
from conversations.export.tasks import first_of_each_task
from conversations.export.text import TextView, TokensAndMask, UnreadableMessagesError, after_common
from conversations.export.writers import json_text, write_json_lines


def retokenised_messages(messages: list[dict[str, str]], view: TextView) -> TokensAndMask:
    """The tokens of datasets/sft_dataset.py with `multiturn`. Raises Refused.

    It renders one text for all, and has a loss range for each assistant message.
    """
    assert view.template is not None
    encode = view.template.encode
    ranges = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = view.render(messages[:index], generation=True)
            response = view.render(messages[: index + 1], generation=False)[len(prompt) :]
            start = len(encode(prompt))
            ranges.append((start, start + len(encode(response))))
    prompt = view.render(messages[:-1], generation=True)
    response = view.render(messages, generation=False)[len(prompt) :]
    if not prompt or not response:
        raise UnreadableMessagesError(
            "its dataset drops a conversation without a prompt or a response"
        )
    ids = encode(_closed(prompt + response, view))
    ids[-1] = view.template.tokenizer.eos_token_id
    mask = [0] * len(ids)
    for start, end in ranges:
        mask[start:end] = [1] * (min(end, len(ids)) - start)
    return ids, mask


def retokenised_pair(prompt: str, completion: str, view: TextView) -> TokensAndMask:
    """The tokens of datasets/reward_dataset.py without a chat template; all of the completion
    counts.
    """
    assert view.template is not None
    ids = view.template.encode(_closed(prompt + completion, view))
    ids[-1] = view.template.tokenizer.eos_token_id
    return after_common(view.template.encode(prompt), ids)


def _closed(text: str, view: TextView) -> str:
    """The text with an end-of-text token, which its datasets add if it is missing."""
    assert view.template is not None
    text, eos = text.rstrip("\n"), view.template.tokenizer.eos_token
    return text if text.endswith(eos) else f"{text} {eos}"


def _sft_rows(source: Source) -> Iterator[Row]:
    view = source.view
    for record in source.sequences():
        messages = view.messages(record)
        if not messages:
            source.leave_out("no sampled message")
            continue
        if source.fits(record, retokenised_messages, messages):
            yield {"input": messages, **origin(record), "reward": record["reward"]}


def _prompt_rows(source: Source) -> Iterator[Row]:
    view = source.view
    if view.template is None:
        raise ExportError(f"{source.run.path}: prompts are text, and {source.notes[-1]}")
    encode = view.template.encode
    for record, rewards in first_of_each_task(source):
        text = view.prompt(record)
        source.count("same" if encode(text) == record["prompt_ids"] else "tokens", record)
        truth = record["ground_truth"]
        label = truth if isinstance(truth, str) else "" if truth is None else json_text(truth)
        yield {
            "input": text,
            "label": label,
            "datasource": str(record["data_source"]),
            "task_id": record["task_id"],
            **rewards,
        }


def _pair_rows(source: Source) -> Iterator[Row]:
    return pairs(source, retokenised_pair)


OPENRLHF_SFT = Format(
    name="openrlhf-sft",
    consumer="OpenRLHF's SFTDataset",
    rows=_sft_rows,
    write=write_json_lines("train.jsonl"),
    unit="trajectory",
    fields={
        "input": "the messages up to the last sampled one; tools stand in the system message, "
        "an assistant's content is as sampled",
        **ORIGIN,
        "reward": "the trajectory's",
    },
    usage="--data.input_key input --data.apply_chat_template --data.multiturn",
)

OPENRLHF_PROMPTS = Format(
    name="openrlhf-prompts",
    consumer="OpenRLHF's PromptDataset",
    rows=_prompt_rows,
    write=write_json_lines("train.jsonl"),
    unit="task",
    fields={
        "input": "the text of the prompt's ids, with chat template and tools; "
        "do not apply a chat template again",
        "label": "the ground truth, as text",
        "datasource": "the task's data source",
        "task_id, samples, reward_mean": "the group in the run, how many of its samples were "
        "exported, and their mean reward",
    },
    usage="--data.input_key input --data.label_key label",
)

OPENRLHF_PREFERENCE = Format(
    name="openrlhf-preference",
    consumer="OpenRLHF's RewardDataset (reward models and DPO)",
    rows=_pair_rows,
    write=write_json_lines("train.jsonl"),
    unit="pair",
    fields=FIELDS,
    usage="--data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected",
)
