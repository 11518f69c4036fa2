"""The record: it reads back equal, its hash is the documented formula, and what is wrong with a
line is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.errors import RecordError
from conversations.formats.hermes import parse
from conversations.messages import assistant_message
from conversations.trajectory import (
    CALL_STATUSES,
    STOP_REASONS,
    Attempt,
    ToolCallRecord,
    Trajectory,
    Turn,
    read_record,
    record_hash,
)

BAD = '<tool_call>{"name": "f", "arguments": {oops\n"é\u2028🙂</tool_call>'


def trajectory(**fields: Any) -> Trajectory:
    raw = f"Let me see.{BAD}"
    line = ToolCallRecord(
        "call_0_0",
        0,
        "f",
        BAD,
        "malformed",
        "Error: malformed",
        attempts=[Attempt("malformed", 0.0, 0.0)],
        error="why",
    )
    values: dict[str, Any] = {
        "id": "t-0", "task_id": "t", "sample": 0, "prompt_ids": [1, 2], "response_ids": [3, 4, 5],
        "response_mask": [1, 1, 0], "response_logprobs": [-0.1, -1e-30, None],
        "segments": [("prompt", 0, 2), ("sampled", 2, 4), ("template", 4, 5)],
        "turns": [Turn(2, 4, "stop", 2, cached_tokens=1, queue_s=0.1, engine_s=0.2,
        weight_version="3")],
        "messages": [{"role": "user", "content": "u"}, assistant_message(raw, parse(raw),
        ["call_0_0"])],
        "tool_calls": [line], "tools": [], "stop_reason": "stop", "num_turns": 1, "infra_error":
        False, "error": None,
        "warnings": [], "reward": 1.0, "reward_parts": {"f": 1.0}, "ground_truth": "42",
        "data_source": None, "extra": {"é": [1, None]},
        "engine": {"name": "scripted"}, "sampling": {"temperature": 1.0}, "parent": None,
        "started_at": "2026-11-23T00:00:00.000+00:00", "wall_s": 0.5,
    }  # fmt: skip
    return Trajectory(**{**values, **fields})


def rewritten(**changes: Any) -> str:
    """A line with other fields and the right hash."""
    record = {**json.loads(trajectory().to_line()), **changes}
    record = {key: value for key, value in record.items() if value is not ...}
    return json.dumps({**record, "sha256": record_hash(record)})


def test_a_record_reads_back_equal() -> None:
    written = trajectory()
    line = written.to_line()
    assert "\n" not in line
    assert Trajectory.from_line(line) == written
    assert Trajectory.from_line(line + "\n") == written
    assert Trajectory.from_line(line).to_line() == line


def test_messages_and_tools_keep_the_order_of_their_keys() -> None:
    """Templates write tools down as JSON, in their order: from sorted ones no prompt could be
    rendered again."""
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    message = {"role": "user", "name": "n", "content": "c"}
    line = trajectory(tools=[tool], messages=[message], extra={"tools": [tool]}).to_line()
    back = Trajectory.from_line(line)
    assert json.dumps([back.tools, back.messages]) == json.dumps([[tool], [message]])
    assert back.to_line() == line
    assert list(json.loads(line)) == [
        *sorted(key for key in json.loads(line) if key != "sha256"),
        "sha256",
    ]


def test_a_malformed_call_survives_the_round_trip() -> None:
    back = Trajectory.from_line(trajectory().to_line())
    assert back.tool_calls[0].arguments == BAD
    assert back.messages[1]["tool_calls"][0]["function"]["arguments"] == BAD
    assert parse(back.messages[1]["raw"]).calls[0].raw == BAD


def test_the_hash_is_the_documented_formula() -> None:
    record = json.loads(trajectory().to_line())
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    assert record["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert record_hash(record) == record["sha256"]


def test_the_fields_are_the_documented_ones() -> None:
    assert set(json.loads(trajectory().to_line())) == {
        "schema", "id", "task_id", "sample", "prompt_ids", "response_ids", "response_mask",
        "response_logprobs", "segments", "turns",
        "messages", "tool_calls", "tools", "stop_reason", "num_turns", "infra_error", "error",
        "warnings", "reward", "reward_parts",
        "ground_truth", "data_source", "extra", "engine", "sampling", "parent", "started_at",
        "wall_s", "branches", "sha256",
    }  # fmt: skip
    record = json.loads(trajectory().to_line())
    assert record["schema"] == "turntrace/2"
    assert set(record["turns"][0]) == {
        "start", "end", "finish_reason", "prompt_tokens", "cached_tokens", "queue_s", "engine_s",
        "weight_version", "resumed",
    }  # fmt: skip
    assert set(record["tool_calls"][0]) == {
        "call_id", "turn", "name", "arguments", "status", "response", "full_response", "reward",
        "metrics", "attempts",
        "queue_s", "run_s", "error",
    }  # fmt: skip
    assert STOP_REASONS == (
        "stop", "tool_stop", "length", "max_turns", "invalid_tool_calls", "deadline", "cancelled",
        "engine_error", "prompt_too_long",
    )  # fmt: skip
    assert CALL_STATUSES == (
        "ok", "external", "tool_error", "backend_error", "timeout", "unknown_tool",
        "invalid_arguments",
        "malformed", "rejected", "cancelled",
    )  # fmt: skip


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), object(), {1}, {(1, 2): 3}, b"x"]
)
@pytest.mark.parametrize("place", ["extra", "ground_truth", "reward", "response_logprobs"])
def test_what_json_has_not_is_refused_when_written(place: str, value: object) -> None:
    with pytest.raises(RecordError, match=r"t-0 .*JSON"):
        trajectory(**{place: [value]}).to_line()


def test_endless_nesting_is_refused_when_written() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecordError, match="cannot be written"):
        trajectory(extra=loop).to_line()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "not a JSON line"),
        ("{", "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        ("[]", "schema is 'list'"),
        ("{}", "schema is None"),
        (rewritten(schema="turntrace/3"), "schema is 'turntrace/3'"),
        (rewritten(branches=[{"parent": None}]), "t-0 is damaged"),
        (
            rewritten(reward=..., wall_s=...),
            r"fields missing: \['reward', 'wall_s'\], unknown: \[\]",
        ),
        (rewritten(rewards=1), r"fields missing: \[\], unknown: \['rewards'\]"),
        (
            trajectory().to_line().replace('"reward":1.0', '"reward":2.0'),
            "t-0 does not match its hash: it was changed",
        ),
        (
            trajectory().to_line().replace('"reward":1.0', '"reward":NaN'),
            "t-0 has no canonical JSON: Out of range",
        ),
        (rewritten(turns=[{"start": 1}]), "t-0 is damaged"),
        (
            rewritten(
                turns=[
                    {"start": 2, "end": 4, "finish_reason": "stop", "prompt_tokens": 2, "more": 1}
                ]
            ),
            "t-0 is damaged",
        ),
        (rewritten(turns=7), "t-0 is damaged"),
        (rewritten(segments=[1]), "t-0 is damaged"),
        (rewritten(tool_calls=[{}]), "t-0 is damaged"),
        (rewritten(tool_calls=["x"]), "t-0 is damaged"),
    ],
)
def test_a_wrong_line_is_named(line: str, says: str) -> None:
    with pytest.raises(RecordError, match=says) as raised:
        Trajectory.from_line(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Trajectory)])
def test_no_field_can_be_changed_unseen(name: str) -> None:
    record = json.loads(trajectory().to_line())
    record[name] = ["changed", record.get(name)]
    with pytest.raises(RecordError, match="hash"):
        read_record(json.dumps(record))


def test_float32_logprobs_are_never_rounded() -> None:
    rng = random.Random(3)
    floats: list[float] = [struct.unpack("f", rng.randbytes(4))[0] for _ in range(5000)]
    values: list[float | None] = [value for value in floats if value - value == 0]
    back = Trajectory.from_line(trajectory(response_logprobs=values).to_line())
    assert [value.hex() for value in back.response_logprobs if value is not None] == [
        value.hex() for value in values if value is not None
    ]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
@settings(max_examples=200, deadline=None)
def test_anything_json_is_carried_through(value: Any) -> None:
    line = trajectory(extra=value, ground_truth=value).to_line()
    back = Trajectory.from_line(line)
    assert (back.extra, back.ground_truth) == (value, value)


def test_lone_surrogates_survive_the_disk() -> None:
    back = Trajectory.from_line(
        trajectory(extra="half \ud83d").to_line().encode("ascii").decode("ascii")
    )
    assert back.extra == "half \ud83d"
