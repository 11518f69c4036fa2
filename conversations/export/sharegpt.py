"""ShareGPT as LLaMA-Factory 0.9.5 reads it, with its dataset_info.json.

Source: data/converter.py, `SharegptDatasetConverter`. A turn with nothing but valid calls is a
`function_call`, any other a `gpt` turn with its text as sampled. Turns must alternate: human or
observation, then gpt or function_call. A turn's tool responses are one observation, joined as
LLaMA-Factory joins them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversations.export.formats import ORIGIN, Format, Record, Row, Source, origin
from conversations.export.text import TextView, TokensAndMask
from conversations.export.writers import json_text, write_json_lines
from conversations.rounds import last_sampled, text_said

FILE = "train.jsonl"
JOINT = "\n</tool_response>\n<tool_response>\n"

_TAGS = {"user": "human", "tool": "observation", "assistant": "gpt"}
_ASKS, _ANSWERS = {"human", "observation"}, {"gpt", "function_call"}


def turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]] | None:
    """ShareGPT's turns of messages without a system message, None if they do not alternate."""
    found: list[dict[str, str]] = []
    for message in messages:
        if message["role"] == "tool" and found and found[-1]["from"] == "observation":
            found[-1]["value"] += JOINT + message["content"]
        else:
            found.append(_turn(message))
    sides = [_ASKS if index % 2 == 0 else _ANSWERS for index in range(len(found))]
    alternate = all(turn["from"] in side for turn, side in zip(found, sides, strict=True))
    return found if alternate and len(found) % 2 == 0 else None


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    calls = message.get("tool_calls") or []
    if (
        calls
        and not message["content"].strip()
        and not message.get("reasoning_content")
        and not any(call.get("malformed") for call in calls)
    ):
        return {"from": "function_call", "value": json_text(_functions(calls))}
    return {"from": _TAGS.get(message["role"], message["role"]), "value": text_said(message)}


def _functions(calls: Sequence[Mapping[str, Any]]) -> Any:
    """One call as an object, several as a list of them."""
    functions = [
        {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}
        for call in calls
    ]
    return functions[0] if len(functions) == 1 else functions


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def retokenised_turns(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], view: TextView
) -> TokensAndMask:
    """The tokens of a trainer that renders the same turns with the run's own chat template.

    It trains on gpt and function_call turns.
    """
    assert view.template is not None
    encode = view.template.encode
    shown = [_as_rendered(message) for message in messages]
    ids: list[int] = []
    mask: list[int] = []
    before = ""
    for index, message in enumerate(shown):
        if message["role"] == "assistant":
            opened = view.render(shown[:index], generation=True, tools=tools)
            now = view.render(shown[: index + 1], generation=False, tools=tools)
            for text, own in ((opened[len(before) :], 0), (now[len(opened) :], 1)):
                piece = encode(text)
                ids += piece
                mask += [own] * len(piece)
            before = now
    return ids, mask


def _as_rendered(message: Mapping[str, Any]) -> dict[str, Any]:
    turn = _turn(message)
    if turn["from"] != "function_call":
        return {"role": message["role"], "content": turn["value"]}
    functions = json.loads(turn["value"])
    calls = [
        {"type": "function", "function": function}
        for function in (functions if isinstance(functions, list) else [functions])
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _rows(source: Source) -> Iterator[Row]:
    for record in source.sequences():
        row = _row(record, source.view)
        if row is None:
            source.leave_out("turns do not alternate as ShareGPT's must")
            continue
        messages = record["messages"][: last_sampled(record["messages"]) + 1]
        if source.fits(record, retokenised_turns, messages, record["tools"]):
            yield row


def _row(record: Record, view: TextView) -> Row | None:
    messages = record["messages"][: last_sampled(record["messages"]) + 1]
    tools = record["tools"]
    given = bool(messages) and messages[0]["role"] == "system"
    system = messages[0]["content"] if given else view.default_system(tools)
    conversation = turns(messages[1:] if given else messages)
    if not conversation:
        return None
    return {
        "conversations": conversation,
        "system": system,
        "tools": json_text(tools) if tools else "",
        **origin(record),
        "reward": record["reward"],
    }


def _write(rows: Iterator[Row], folder: Path) -> int:
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    info = {"turntrace": {"file_name": FILE, "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="ascii")
    return write_json_lines(FILE)(rows, folder)


SHAREGPT = Format(
    name="sharegpt",
    consumer="LLaMA-Factory (checked with the run's own chat template)",
    rows=_rows,
    write=_write,
    unit="trajectory",
    fields={
        "conversations": "turns of {from, value}: human, gpt, "
        "function_call (JSON of name and arguments), observation",
        "system": "the system message, or what the run's chat template says where none was given",
        "tools": "the OpenAI tool schemas offered, as JSON text",
        **ORIGIN,
        "reward": "the trajectory's",
    },
    usage="dataset: turntrace, dataset_dir: this folder (dataset_info.json is here)",
)
