"""Records with branches: rows, paths, and `verify` on each branch and on the sums."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from conversations.branches import Totals, first_turn, own_part, path_of, rows, sequences
from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from conversations.errors import RecordError
from conversations.template import ChatTemplate
from conversations.trajectory import BRANCH_REASONS, Trajectory, line_hash
from tests.conversations.session.sessions import Client, branched
from tests.helpers import hermes_template


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return hermes_template()


@pytest.fixture(scope="module")
def client(template: ChatTemplate) -> Client:
    return branched(template)


@pytest.fixture(scope="module")
def record(client: Client) -> Trajectory:
    return client.record()


def found(record: Trajectory | dict[str, Any], template: ChatTemplate) -> list[str]:
    """What `verify` says of a record."""
    if isinstance(record, dict):
        body = {key: value for key, value in record.items() if key != "sha256"}
        line = json.dumps({**body, "sha256": line_hash(body)})
    else:
        line = record.to_line()
    facts = RunFacts(template=template, is_gateway=True)
    return [finding.what for finding in check_line(f"{line}\n".encode(), facts).findings]


def test_the_session_has_a_branch_of_each_reason(record: Trajectory) -> None:
    reasons = {branch.reason for branch in record.branches}
    assert reasons == set(BRANCH_REASONS) - {"template"}
    assert any(branch.parent and branch.parent["branch"] > 0 for branch in record.branches)


def test_it_has_no_defect(record: Trajectory, template: ChatTemplate) -> None:
    assert found(record, template) == []
    assert Trajectory.from_line(record.to_line()) == record


def test_each_sampled_token_is_trained_in_one_row(client: Client, record: Trajectory) -> None:
    every = list(rows(record))
    assert [row.branch for row in every] == list(range(len(record.branches) + 1))
    trained = [
        (row.trajectory.prompt_ids + row.trajectory.response_ids)[turn.start : turn.end]
        for row in every
        for turn in row.trajectory.turns
    ]
    assert sorted(trained) == sorted(turn.sampled.ids.tolist() for turn in client.tree.turns)
    assert sum(sum(row.trajectory.response_mask) for row in every) == client.tree.sampled_length
    assert Totals.of(record).sampled_tokens == client.tree.sampled_length


def test_a_path_is_what_the_engine_saw(client: Client, record: Trajectory) -> None:
    by_id = {turn.response_id: turn for turn in client.tree.turns}
    for number in range(len(record.branches) + 1):
        path = path_of(record, number)
        ids = path.prompt_ids + path.response_ids
        for turn in path.turns:
            known = by_id[turn.response_id]
            seen = [token for run in known.runs() for token in run.ids]
            assert ids[: turn.end] == seen
            assert turn.prompt_tokens == turn.start
        row = own_part(record, number)
        assert row.prompt_ids + row.response_ids == ids
        assert [m["content"] for m in row.messages] == [m["content"] for m in path.messages]
        assert row.num_turns == len(path.turns) - first_turn(record, number)


def test_rows_hold_together(record: Trajectory) -> None:
    for row in rows(record):
        one = row.trajectory
        assert len(one.response_ids) == len(one.response_mask) == len(one.response_logprobs)
        assert one.segments[0][1] == 0
        assert one.segments[-1][2] == len(one.prompt_ids) + len(one.response_ids)
        assert sum(isinstance(m.get("raw"), str) for m in one.messages) == len(one.turns)
        assert {line.turn for line in one.tool_calls} <= set(range(len(one.turns)))


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a token": lambda one: one["response_ids"].__setitem__(0, 5),
    "the mask": lambda one: one["response_mask"].__setitem__(0, 0),
    "a log-prob": lambda one: one["response_logprobs"].__setitem__(0, 0.5),
    "a segment": lambda one: one["segments"].pop(),
    "raw": lambda one: one["messages"][-1].__setitem__("raw", "x"),
    "a message": lambda one: one["messages"].pop(0),
    "prompt_tokens": lambda one: one["turns"][0].__setitem__("prompt_tokens", 3),
    "the prompt": lambda one: one["prompt_ids"].pop(),
    "a turn": lambda one: one["turns"].clear(),
    "lengths": lambda one: one["response_mask"].append(1),
    "the reason": lambda one: one.__setitem__("reason", "whim"),
    "the parent": lambda one: one.__setitem__("parent", {"branch": 99, "turn": 1}),
    "the turn of departure": lambda one: one.__setitem__("parent", {"branch": 0, "turn": 40}),
    "an answer": lambda one: (
        one["tool_calls"].append(one["tool_calls"][0])
        if one["tool_calls"]
        else one["messages"].append({"role": "narrator"})
    ),
}


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_to_a_branch_is_found(
    record: Trajectory, template: ChatTemplate, what: str, number: int
) -> None:
    line = json.loads(record.to_line())
    DAMAGE[what](line["branches"][number])
    assert found(line, template)


def test_a_turn_that_stands_in_two_branches_is_found(
    record: Trajectory, template: ChatTemplate
) -> None:
    twice = replace(record, branches=[*record.branches, record.branches[-1]])
    assert any("served as" in what for what in found(twice, template))


def test_a_branch_of_itself_is_refused(record: Trajectory) -> None:
    line = copy.deepcopy(record.branches[0])
    damaged = replace(record, branches=[replace(line, parent={"branch": 1, "turn": 1})])
    with pytest.raises(RecordError, match="parent"):
        list(rows(damaged))


def test_a_record_without_branches_is_its_own_row(record: Trajectory) -> None:
    alone = replace(record, branches=[])
    assert [row.trajectory for row in rows(alone)] == [alone]
    assert sequences(alone) == [alone]
