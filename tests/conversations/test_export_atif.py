"""ATIF there and back: the `atif` package's own models accept every document, and what comes
back is the record, byte for byte."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import conversations
from conversations.atif import document, record_of
from conversations.errors import RecordError
from conversations.imports.job import import_run
from conversations.upgrade import upgraded
from conversations.verify import verify_run
from tests.conversations.exports import exported, small_run


def records() -> list[dict[str, Any]]:
    return list(small_run().records())


def test_the_atif_package_accepts_every_document() -> None:
    import atif

    folder, done = exported("atif")
    lines = (folder / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == done.rows
    for line, record in zip(
        lines, (one for one in records() if not one["infra_error"]), strict=True
    ):
        found = atif.Trajectory.model_validate_json(line, strict=True)
        generations = [step.metrics for step in found.steps if step.metrics is not None]
        ids = record["prompt_ids"] + record["response_ids"]
        assert [(one.prompt_token_ids, one.completion_token_ids) for one in generations] == [
            (ids[: turn["start"]], ids[turn["start"] : turn["end"]]) for turn in record["turns"]
        ]
        sampled = [value for value in record["response_logprobs"] if value is not None]
        assert [value for one in generations for value in one.logprobs or []] == sampled
        assert found.extra is not None
        assert found.extra["turntrace"]["response_mask"] == record["response_mask"]
        calls = [call for step in found.steps for call in step.tool_calls or []]
        assert [call.tool_call_id for call in calls] == [
            line["call_id"] for line in record["tool_calls"]
        ]


def test_a_record_comes_back_as_it_was() -> None:
    for record in records():
        assert upgraded(record_of(json.loads(json.dumps(document(record))))) == record


def test_given_assistants_unasked_tools_and_odd_arguments_come_back() -> None:
    record = copy.deepcopy(next(record for record in records() if record["turns"]))
    call = {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": '{"b":1, "a": [ ]}'},
        "more": 1,
    }
    record["messages"][:0] = [
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": ""},
        {
            "content": "c",
            "role": "assistant",
            "raw": None,
            "tool_calls": [call, {**call, "id": "y"}],
            "reasoning": "r",
        },
        {"role": "tool", "tool_call_id": "y", "content": "1"},
        {"role": "tool", "content": "2", "name": "unasked"},
        {"role": "tool", "content": "3"},
        {
            "role": "assistant",
            "content": "",
            "raw": None,
            "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": "oops"}}],
        },
    ]
    back = upgraded(record_of(json.loads(json.dumps(document(record)))))
    assert back == record
    assert json.dumps(back["messages"]) == json.dumps(record["messages"]), (
        "with the keys in the same order"
    )


def test_a_whole_run_comes_back_byte_for_byte(tmp_path: Path) -> None:
    from conversations.export import job
    from conversations.export.filters import Filters

    run = small_run()
    job.export_run(run, "atif", tmp_path / "atif", Filters(include_infra_errors=True))
    done = import_run(
        tmp_path / "atif" / "trajectories.jsonl",
        "atif",
        tmp_path / "run",
        tokenizer=run.path / "tokenizer",
    )
    assert (done.trajectories, done.defects) == (len(run), [])
    assert (tmp_path / "run" / "trajectories.jsonl").read_bytes() == (
        run.path / "trajectories.jsonl"
    ).read_bytes()
    assert verify_run(tmp_path / "run", jobs=1).defects == 0
    assert (
        conversations.open_run(tmp_path / "run").template().stop_token_ids
        == run.template().stop_token_ids
    )


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda record: record["response_mask"].pop(), "not as many mask bits or log-probs"),
        (
            lambda record: record["response_logprobs"].__setitem__(0, float("nan")),
            "a log-prob is not a finite number",
        ),
        (lambda record: record["turns"].pop(), "turns, but"),
    ],
)
def test_tokens_that_do_not_line_up_are_not_written(damage: Any, what: str) -> None:
    record = copy.deepcopy(next(record for record in records() if record["turns"]))
    damage(record)
    with pytest.raises(RecordError, match=what):
        document(record)
