"""What a turn of a coding agent costs a gateway beside HTTP: body, match, encode, commit, journal.

    python -m tests.bench.session_turn [--quick]

Sessions open at 50,000 tokens; each of 31 turns adds 2,700 new ones and samples 340, to 144,000 at
the end. The messages come fresh out of JSON each turn, as over HTTP. A second row says how much
more a turn costs after 100,000 tokens than after 10,000.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from time import process_time
from typing import Any, TypeVar

import orjson

from agent.engines.engine import Generation
from conversations.session import SessionTree
from conversations.template import ChatTemplate
from tests.bench.encoder import new_text
from tests.bench.row import Row
from tests.bench.workload import TOOL_NAME, TOOL_SCHEMA, Workload, workload

METRIC = "session_turn_cpu_ms"
TURNS = 31
PARTS = ("body", "match", "ids", "add", "journal")
LIMIT_MS = 4.0
"""Of a gateway's whole turn, HTTP included."""
GROWTH_LIMIT_MS = 2.0
ANSWER_TOKENS, SAMPLED_TOKENS = 2_700, 340

T = TypeVar("T")


class Session:
    """One session of an agent, and the CPU seconds of each part of its turns."""

    def __init__(self, template: ChatTemplate, opening_tokens: int) -> None:
        self.tree = SessionTree(template)
        self._characters = _characters_a_token(template)
        opening = self._text(opening_tokens)
        self.history: list[dict[str, Any]] = [
            {"role": "system", "content": "You are a coding agent."},
            {"role": "user", "content": opening},
        ]
        self.took_s: dict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}

    def _text(self, tokens: int) -> str:
        return new_text(int(self._characters * tokens))

    def turn(self) -> int:
        """Runs one turn; returns the tokens before it."""
        self.last = {}
        sent = orjson.dumps({"messages": self.history, "tools": [TOOL_SCHEMA]})
        body = self._timed("body", lambda: orjson.loads(sent))
        place = self._timed("match", lambda: self.tree.match(body["messages"], body["tools"]))
        text = self._timed("ids", place.prompt_ids.json)
        assert len(text) > 2 * place.prompt_length
        sampled = _sampled(self.tree.template, self._text(SAMPLED_TOKENS - 30))
        turn = self._timed("add", lambda: self.tree.add(place, sampled))
        self._timed("journal", lambda: orjson.dumps(self.tree.entry(turn)))
        answer = {
            "role": "tool",
            "tool_call_id": turn.call_ids[0],
            "content": self._text(ANSWER_TOKENS),
        }
        self.history += [json.loads(json.dumps(turn.served)), answer]
        return place.prompt_length

    def _timed(self, part: str, work: Callable[[], T]) -> T:
        started = process_time()
        result = work()
        self.last[part] = process_time() - started
        self.took_s[part] += self.last[part]
        return result


def _characters_a_token(template: ChatTemplate) -> float:
    """How many characters of `new_text` make a token."""
    text = new_text(20_000)
    return len(text) / len(template.encode(text))


def _sampled(template: ChatTemplate, code: str) -> Generation:
    """A turn with one call."""
    call = json.dumps({"name": TOOL_NAME, "arguments": {"code": code}})
    text = f"I run this.\n<tool_call>\n{call}\n</tool_call>"
    ids = [*template.encode(text), template.end_id]
    return Generation(ids, [-0.125] * len(ids), "stop")


def rows(work: Workload, *, quick: bool) -> list[Row]:
    """A row for the shape of coding agents, and one for how it grows."""
    warm = Session(work.template, 10_000)
    for _ in range(3):
        warm.turn()
    whole, parts, first, last = [], defaultdict(list), [], []
    for _ in range(2 if quick else 5):
        session = Session(work.template, 50_000)
        for _ in range(TURNS):
            session.turn()
        whole.append(1e3 * sum(session.took_s.values()) / TURNS)
        for part in PARTS:
            parts[part].append(1e3 * session.took_s[part] / TURNS)
        growing = Session(work.template, 7_000)
        growing.turn()
        costs = [(growing.turn(), sum(growing.last.values())) for _ in range(TURNS)]
        first.append(1e3 * sum(cost for _, cost in costs[:3]) / 3)
        last.append(1e3 * sum(cost for _, cost in costs[-3:]) / 3)
    detail = ", ".join(f"{part} {sorted(parts[part])[len(whole) // 2]:.2f}" for part in PARTS)
    growth = [after - before for before, after in zip(first, last, strict=True)]
    at = f"from {costs[1][0]} to {costs[-2][0]} tokens, {work.template.encoder}"
    return [
        Row(METRIC, whole, case=f"{TURNS} turns from 50k", limit=LIMIT_MS, note=detail),
        Row(METRIC, growth, case="growth", limit=GROWTH_LIMIT_MS, note=at),
    ]


if __name__ == "__main__":
    for row in rows(workload(), quick="--quick" in sys.argv):
        print(*row.cells(), sep=" | ")
