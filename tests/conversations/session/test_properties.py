"""Any sequence of what clients do to a history: the engine sees the path, and a break is a branch.

Each step takes a turn of the session and sends its history on: as it is, spelt otherwise, with a
message changed, a turn left out, another sample wanted. Templates that cannot be continued with
some roles start anew, rendered whole.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.engines.engine import Generation
from conversations.branches import path_of, rows
from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from conversations.messages import Message
from conversations.session import SessionTree, SessionTurn
from conversations.template import ChatTemplate
from tests.conversations.session.sessions import ASK, TOOL, record_of_tree
from tests.conversations.test_template import named
from tests.helpers import call, odd_text, respelled

WITH_TOOLS = ["smollm2", "qwen2_5", "qwen3", "qwen3_thinking"]
WITHOUT = ["llama3", "glm", "harmony", "metaspace_plain"]
CONTINUED = ("go_on", "respell", "reorder")
BROKEN = ("edit", "edit_call", "drop", "resample", "rewrite")

steps = st.lists(
    st.tuples(st.sampled_from([*CONTINUED, *CONTINUED, *BROKEN]), st.integers(0, 2**32)),
    min_size=1,
    max_size=7,
)


class Session:
    """A client that keeps the history of each turn, and a model that says anything."""

    def __init__(self, template: ChatTemplate, *, with_tools: bool) -> None:
        self.tree = SessionTree(template)
        self.tools = [TOOL] if with_tools else []
        self.histories: dict[SessionTurn, list[Message]] = {}
        self.seen: dict[SessionTurn, list[int]] = {}

    def send(self, history: list[Message], rng: random.Random) -> tuple[str | None, SessionTurn]:
        """Sends a history; checks what the engine sees. Returns the reason and the turn."""
        place = self.tree.match(history, self.tools)
        prompt = place.prompt_ids.to_list()
        before = self.seen[place.parent] if place.parent else []
        assert prompt[: len(before)] == before
        assert json.loads(place.prompt_ids.json()) == prompt
        assert place.prompt_length == len(prompt)
        template = self.tree.template
        ids = respelled(template, self._says(rng), rng)
        if is_complete := rng.random() < 0.9:
            ids.append(template.end_id)
        ids = ids or [template.end_id]
        generation = Generation(ids, [-0.5] * len(ids), "stop" if is_complete else "length")
        turn = self.tree.add(place, generation, response_id=f"r{len(self.tree.turns)}")
        self.seen[turn] = prompt + ids
        self.histories[turn] = [*history, copy.deepcopy(turn.served)]
        return place.reason, turn

    def _says(self, rng: random.Random) -> str:
        text = rng.choice(["So {}.", "<think>\nhm\n</think>\n\nyes {}", "a b  {}"])
        text = text.format(len(self.tree.turns))  # turns that say the same cannot be told apart
        if not self.tools or rng.random() < 0.4:
            return text
        calls = [call(rng.choice(["read", "nobody"]), x=n, y=odd_text(rng)) for n in range(2)]
        if rng.random() < 0.3:
            calls[1] = '<tool_call>{"name": "read", "arguments": {oops</tool_call>'
        return "\n".join([text, *calls[: rng.choice([1, 2])]])

    def after(self, turn: SessionTurn, rng: random.Random) -> list[Message]:
        """The history up to a turn, and what a client says next."""
        history = copy.deepcopy(self.histories[turn])
        for call_id in turn.call_ids:
            history.append({"role": "tool", "tool_call_id": call_id, "content": odd_text(rng)})
        if not turn.call_ids or rng.random() < 0.3:
            history.append({"role": "user", "content": f"go on {rng.random()}"})
        return history


def respelt(history: list[Message], rng: random.Random, turn: SessionTurn) -> None:
    """Changes the echoes of a turn's path in the ways that do not count.

    In a sequence that began anew, what was a turn before is the client's own message: there a
    malformed call is text like any other.
    """
    echoed = {call_id for one in path_to(turn) for call_id in one.call_ids}
    for message in history:
        if message["role"] != "assistant":
            continue
        message.pop("reasoning_content", None)
        message["index"] = rng.randrange(9)
        if not message["content"] and rng.random() < 0.5:
            message["content"] = None
        elif message["content"]:
            message["content"] = f"\n{message['content']}  "
        for one in message.get("tool_calls", ()):
            try:
                value: Any = json.loads(one["function"]["arguments"])
            except ValueError:  # malformed: each client writes something else
                if one["id"] not in echoed:
                    continue
                one["function"] = {"name": "invalid", "arguments": '{"error": "no JSON"}'}
                continue
            spelt = json.dumps(dict(reversed(value.items())), indent=rng.choice([None, 1]))
            one["function"]["arguments"] = spelt


def path_to(turn: SessionTurn | None) -> list[SessionTurn]:
    """A turn and those before it in its sequence."""
    return [*path_to(turn.parent), turn] if turn else []


def reordered(history: list[Message]) -> None:
    """Puts the last tool messages in another order."""
    places = [n for n, one in enumerate(history) if one["role"] == "tool"]
    run = [n for n in places if set(range(n, places[-1] + 1)) <= set(places)] if places else []
    if run:
        history[run[0] : run[-1] + 1] = history[run[0] : run[-1] + 1][::-1]


def apply(session: Session, step: str, rng: random.Random) -> None:
    """One step, and whether it has to be a branch."""
    turn = rng.choice(session.tree.turns[-3:])
    history = session.after(turn, rng)
    place = len(session.histories[turn]) - 1
    is_tip = not turn.children
    if step == "respell":
        respelt(history, rng, turn)
    elif step == "reorder":
        reordered(history)
    elif step == "edit":
        user = next(n for n, one in enumerate(history) if one["role"] == "user")
        history[user]["content"] += " changed"
    elif step == "edit_call":
        if not turn.call_ids or turn.invalid[0]:
            return
        history[place]["tool_calls"][0]["function"]["arguments"] = '{"other": true}'
    elif step == "drop":
        del history[place]
        history = [*history[:place], {"role": "user", "content": f"error {rng.random()}"}]
    elif step == "resample":
        history = history[:place]
    elif step == "rewrite":
        history[place] = {"role": "assistant", "content": f"mine {rng.random()}"}
        history = [*history[: place + 1], {"role": "user", "content": "well?"}]
    reason, added = session.send(history, rng)
    if step in BROKEN:
        assert reason is not None
    elif is_tip and reason is not None:
        assert reason in ("template", "resampled")  # the template cannot be continued so
        assert added.parent is None
    if step == "resample":
        assert reason == "resampled"


@pytest.mark.parametrize("name", [*WITH_TOOLS, *WITHOUT])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, seed=st.integers(0, 2**32))
def test_whatever_a_client_does(name: str, steps: list[tuple[str, int]], seed: int) -> None:
    template = named(name)
    session = Session(template, with_tools=name in WITH_TOOLS)
    assert session.send(copy.deepcopy(ASK), random.Random(seed))[0] is None
    for step, number in steps:
        apply(session, step, random.Random(number))
    record = record_of_tree(session.tree)
    by_id = {turn.response_id: turn for turn in session.tree.turns}
    trained = 0
    for row in rows(record):
        trained += sum(row.trajectory.response_mask)
        path = path_of(record, row.branch)
        ids = path.prompt_ids + path.response_ids
        for turn in path.turns:
            assert ids[: turn.end] == session.seen[by_id[turn.response_id]]
    assert trained == session.tree.sampled_length
    facts = RunFacts(template=template, is_gateway=True)
    line = f"{record.to_line()}\n".encode("utf-8", "surrogatepass")
    assert [finding.what for finding in check_line(line, facts).findings] == []
    again = SessionTree(template)
    for turn in session.tree.turns:
        again.restore(json.loads(json.dumps(session.tree.entry(turn))))
    assert again.record_fields() == session.tree.record_fields()
