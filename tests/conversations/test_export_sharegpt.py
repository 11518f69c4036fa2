"""What LLaMA-Factory's own converter and template make of a ShareGPT export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conversations.export.sharegpt import JOINT, retokenised_turns, turns
from conversations.export.text import TextView, last_sampled, whole_ids
from tests.conversations.exports import exported, rows, small_run


def test_llamafactory_trains_on_what_the_export_foresaw() -> None:
    folder, done = exported("sharegpt")
    run = small_run()
    view = TextView(run.template(), {})
    script = Path(__file__).with_name("llamafactory_reads.py")
    read = subprocess.run(
        [sys.executable, script, folder, run.path / "tokenizer"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert read.returncode == 0, read.stderr[-2000:]
    found = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]
    assert len(found) == done.rows > 20
    kinds = set()
    for row, written in zip(found, rows(folder), strict=True):
        record = run.record(written["id"])
        end = record["turns"][-1]["end"]
        messages = record["messages"][: last_sampled(record["messages"]) + 1]
        assert row["ids"][:end] == whole_ids(record)[:end]
        assert (row["ids"], row["mask"]) == retokenised_turns(messages, record["tools"], view)
        kinds |= set(row["roles"])
    assert kinds == {"user", "assistant", "function", "observation"}


def test_a_turn_that_says_more_than_its_calls_keeps_its_text() -> None:
    call = {
        "id": "call_0_0",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": 1}'},
    }
    messages = [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": "",
            "raw": "<tool_call>...</tool_call>",
            "tool_calls": [call, call],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {
            "role": "assistant",
            "content": "So.",
            "raw": "So.<tool_call>...</tool_call>",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "3"},
        {
            "role": "assistant",
            "content": "",
            "raw": "<tool_call>{</tool_call>",
            "tool_calls": [{**call, "malformed": True}],
        },
    ]
    functions = '[{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 1}}]'
    assert turns(messages) == [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": functions},
        {"from": "observation", "value": f"1{JOINT}2"},
        {"from": "gpt", "value": "So.<tool_call>...</tool_call>"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "<tool_call>{</tool_call>"},
    ]
    assert turns([messages[0], messages[2], messages[1]]) is None, (
        "a tool that spoke unasked has no place"
    )
