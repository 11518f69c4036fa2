"""The matcher: what continues a session, what branches, and for which of the eight reasons."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from typing import Any

import pytest

from conversations.errors import MessageError
from conversations.messages import Message
from conversations.session import SessionTree
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.conversations.session.sessions import ASK, TOOL, Client, begun
from tests.helpers import call, hermes_template

READ = TOOL["function"]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return hermes_template()


@pytest.fixture
def client(template: ChatTemplate) -> Client:
    return Client(template)


def test_an_unchanged_history_continues_token_for_token(client: Client) -> None:
    first = begun(client)
    place = client.match()
    assert (place.parent, place.reason) == (first, None)
    assert list(place.prompt_ids)[: first.end] == [*client.tree.turns[0].runs()[0].ids,
                                                   *first.sampled.ids]  # fmt: skip
    whole = client.tree.template.prompt(
        [*ASK, first.message, {"role": "tool", "content": "one\n"}], [TOOL]
    )
    assert list(place.prompt_ids) == [token for _, ids in whole for token in ids]
    assert place.prompt_length == len(place.prompt_ids)
    assert json.loads(place.prompt_ids.json()) == list(place.prompt_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"content": None},
        {"content": " \n"},
        {"reasoning_content": "a thought of its own"},
        {"refusal": None, "index": 3},
        {"arguments": '{ "lines":[1,2.0],"path" : "a"}'},
    ],
    ids=["null", "blanks", "thought", "other keys", "arguments"],
)
def test_what_clients_do_to_an_echo_continues(client: Client, change: dict[str, Any]) -> None:
    begun(client)
    echo = client.history[2]
    if "arguments" in change:
        echo["tool_calls"][0]["function"]["arguments"] = change["arguments"]
    else:
        echo.update(change)
    assert client.match().reason is None


@pytest.mark.parametrize(
    ("place", "message", "reason"),
    [
        (1, {"role": "user", "content": "Another question?"}, "new"),
        (0, {"role": "system", "content": "Be loud."}, "system"),
        (2, {"role": "assistant", "content": "Nothing."}, "rewritten"),
        (3, {"role": "user", "content": "Go on."}, None),
    ],
)
def test_a_changed_message(
    client: Client, place: int, message: Message, reason: str | None
) -> None:
    begun(client)
    client.history[place] = message
    assert client.match().reason == reason


def test_the_reasons_of_a_branch_after_a_turn(client: Client) -> None:
    begun(client)
    client.turn(call("read", path="b"))
    known = client.history[:]
    client.history = known[:4]
    assert (client.match().reason, len(client.match().earlier)) == ("resampled", 1)
    client.history = [*known[:3], {**known[3], "content": "two"}]
    assert client.match().reason == "edited"
    client.history = [*known[:4], {"role": "user", "content": "Tool call error."}]
    assert client.match().reason == "dropped"
    client.history = [*known[:4], {"role": "assistant", "content": "x"}, ASK[1]]
    assert client.match().reason == "rewritten"
    client.history = copy.deepcopy([*known, {"role": "tool", "tool_call_id": "?", "content": "y"}])
    client.history[4]["tool_calls"][0]["function"]["arguments"] = '{"path": "c"}'
    assert client.match().reason == "edited"
    client.history, client.tools = known[:4], []
    assert client.match().reason == "tools"


def test_a_named_turn_is_its_whole_history(client: Client) -> None:
    turn = begun(client)
    result, whole = client.history[3:], client.match()
    tree = client.tree
    for messages in (result, [ASK[0], *result]):
        place = tree.match(messages, client.tools, after=turn)
        assert (place.parent, place.reason) == (turn, None)
        assert place.prompt_ids == whole.prompt_ids
    system: Message = {"role": "system", "content": "Be loud."}
    place = tree.match([system, *result], client.tools, after=turn)
    assert (place.parent, place.reason, len(place.given)) == (None, "system", 4)
    client.history[0] = system
    assert place.prompt_ids == client.match().prompt_ids
    place = tree.match(result, [], after=turn)
    assert (place.parent, place.reason, place.tools, len(place.given)) == (None, "tools", [], 4)


def test_of_equal_turns_the_named_one_is_continued(client: Client) -> None:
    first = client.turn("Yes.")
    client.history.pop()
    second = client.turn("Yes.")
    for turn in (first, second):
        place = client.tree.match([{"role": "user", "content": "Sure?"}], client.tools, after=turn)
        assert (place.parent, place.reason) == (turn, None)


def test_results_go_in_the_order_of_the_calls(client: Client) -> None:
    turn = client.turn(call("read", path="a") + call("read", path="b"))
    client.answer(turn, "A", "B")
    in_order = client.match().prompt_ids
    client.history[-2:] = client.history[:-3:-1]
    place = client.match()
    assert place.prompt_ids == in_order
    assert place.notes == ("reordered",)


def test_call_ids_decide_where_a_call_was_malformed_or_unknown(client: Client) -> None:
    turn = client.turn('<tool_call>{"name": "read", "arguments": {oops</tool_call>'
                       + call("nobody", x=1))  # fmt: skip
    client.answer(turn, "no JSON", "no such tool")
    for one in client.history[2]["tool_calls"]:
        one["function"] = {"name": "invalid", "arguments": "{}"}
    place = client.match()
    assert (place.parent, place.reason, place.echoes) == (turn, None, (turn,))


ANY = {"default": False}
EDITS = {"type": "array", "items": {"properties": {"all": ANY}}}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"path": "a", "edits": [{"old": "x", "all": False}], "all": False}, None),
        ({"path": "a", "edits": [{"old": "x"}], "all": True}, "edited"),
        ({"path": "a", "edits": [{"old": "x"}], "more": False}, "edited"),
        ({"path": "b", "edits": [{"old": "x"}], "all": False}, "edited"),
        ({"path": "a", "edits": [{"old": "x"}, {"all": False}]}, "edited"),
        ({"path": "a", "all": False}, "edited"),
    ],
)
def test_only_defaults_of_the_schema_may_be_added_to_a_call(
    template: ChatTemplate, sent: dict[str, Any], reason: str | None
) -> None:
    schema = {"type": "object", "properties": {"all": ANY, "edits": EDITS, "path": True}}
    client = Client(template, [{"type": "function", "function": {**READ, "parameters": schema}}])
    turn = client.turn(call("read", path="a", edits=[{"old": "x"}]))
    client.answer(turn, "done")
    client.turn("Next.")
    client.user("Go on.")
    client.history[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(sent)
    assert client.match().reason == reason


def test_a_session_with_branches_is_a_record(client: Client) -> None:
    begun(client)
    client.turn(call("read", path="b"))
    client.history = [*client.history[:3], {**client.history[3], "content": "two"}]
    client.turn("It is two.")
    client.history.append({"role": "user", "content": "Sure?"})
    client.turn("Yes.")
    record = client.record()
    assert Trajectory.from_line(record.to_line()) == record
    assert record.num_turns == 3
    (branch,) = record.branches
    assert (branch.parent, branch.reason) == ({"branch": 0, "turn": 1}, "edited")
    sampled = sum(record.response_mask) + sum(branch.response_mask)
    assert sampled == client.tree.sampled_length
    assert [line.call_id for line in branch.tool_calls] == ["call_1_0"]


def test_a_journal_brings_a_session_back(client: Client) -> None:
    begun(client)
    client.turn("One.")
    client.history = client.history[:2]
    client.turn("None.")
    again = SessionTree(client.tree.template)
    for turn in client.tree.turns:
        again.restore(client.tree.entry(turn))
    assert again.record_fields() == client.tree.record_fields()


def test_what_is_no_chat_message_is_refused(client: Client) -> None:
    with pytest.raises(MessageError, match="role"):
        client.tree.match([{"role": "narrator", "content": "x"}])


def test_a_long_session_needs_no_deep_stack(client: Client) -> None:
    """Sessions of thousands of turns are matched within Python's limit on calls."""
    begun(client)
    limit = sys.getrecursionlimit()
    for number in range(200):
        client.turn("x")
        client.user(f"more {number}")
    sys.setrecursionlimit(len(inspect.stack(0)) + 120)
    try:
        place = client.match()
    finally:
        sys.setrecursionlimit(limit)
    assert place.parent is client.tree.turns[-1]
