"""Recorded traffic of agent programs against the matcher: what each request does to its session.

    python -m tests.agent.gateway.traffic FOLDER [--fixture FILE]

FOLDER holds a JSON Lines file a session: a line about the client, then a line a request with
`path`, `body` and what the endpoint `answered`. Bodies are read by the gateway's own dialects; a
scripted model says what was answered. Prints a line a file, and the sums. `--fixture` writes the
structure of the sessions: roles, calls, ids, which texts are equal and how they are blanked, in
words of ours; the test reads that.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agent.engines.engine import Generation
from agent.gateway.anthropic import ANTHROPIC
from agent.gateway.chat import CHAT
from agent.gateway.request import Refusal
from agent.gateway.responses import RESPONSES
from conversations.messages import Message
from conversations.session import SessionTree, SessionTurn
from conversations.template import ChatTemplate

DIALECTS = {"/messages": ANTHROPIC, "/responses": RESPONSES, "/chat/completions": CHAT}
Session = list[dict[str, Any]]
"""Requests: {messages, tools, answer}, an answer in OpenAI's schema."""


# ---------------------------------------------------------------------- recorded files


def read_file(file: Path) -> Session:
    """The turns of a recorded file, in OpenAI's schema. What is refused, or failed, is left out."""
    steps = []
    with file.open(encoding="utf-8") as lines:
        next(lines)
        for row in map(json.loads, lines):
            if row.get("side") or isinstance(row.get("answered", {}).get("error"), list):
                continue
            if "answered" in row and (step := _step(row)):
                steps.append(step)
    return steps


def _step(row: dict[str, Any]) -> dict[str, Any] | None:
    dialect = next(found for path, found in DIALECTS.items() if path in row["path"])
    try:
        request = dialect.read(orjson.dumps(row["body"]))
    except Refusal as refusal:
        print(f"  refused: {refusal}")
        return None
    answer = _answer(row["answered"])
    return {"messages": request.messages, "tools": request.tools, "answer": answer}


def _answer(answered: dict[str, Any]) -> Message:
    if "choices" in answered:
        message = answered["choices"][0]["message"]
        calls = [
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        return _message(message.get("content"), message.get("reasoning_content"), calls)
    text, thought, calls = "", "", []
    for part in answered.get("output") or answered.get("content") or ():
        kind = part["type"]
        if kind in ("function_call", "custom_tool_call"):
            calls.append((part["call_id"], part["name"], part.get("arguments", part.get("input"))))
        elif kind == "tool_use":
            calls.append((part["id"], part["name"], json.dumps(part["input"])))
        elif kind in ("text", "message"):
            parts = part.get("content", [part])
            text += "".join(one.get("text", "") for one in parts)
        elif kind in ("thinking", "reasoning"):
            thought += str(part.get("thinking") or "thought")
    return _message(text, thought, calls)


def _message(
    text: str | None, thought: str | None, calls: Iterable[tuple[str, str, str]]
) -> Message:
    message: Message = {"role": "assistant", "content": text or ""}
    if thought:
        message["reasoning_content"] = thought
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {**message, "tool_calls": made} if made else message


# ---------------------------------------------------------------------- through the matcher


@dataclass
class Played:
    """What the requests of a session did."""

    tree: SessionTree
    kinds: list[str] = field(default_factory=list)
    reordered: int = 0

    def summary(self) -> dict[str, Any]:
        """The line of the table."""
        counts = Counter(self.kinds)
        branches = {k: n for k, n in sorted(counts.items()) if k not in ("first", "continued")}
        found = {"turns": len(self.kinds), "continued": counts["continued"], "branches": branches}
        return {**found, "reordered": self.reordered} if self.reordered else found


def play(session: Session, template: ChatTemplate) -> Played:
    """Sends the requests in order; the model says what was answered, under ids of ours."""
    played = Played(SessionTree(template))
    ids: dict[str, str] = {}
    for number, step in enumerate(session):
        place = played.tree.match(_with_ids(step["messages"], ids), step["tools"])
        text = _sampled_text(step["answer"])
        sampled = [*template.encode(text), template.end_id]
        turn = played.tree.add(
            place, Generation(sampled, [-0.5] * len(sampled), "stop"), response_id=f"r{number}"
        )
        _remember(ids, step["answer"], turn)
        played.kinds.append(place.reason or ("continued" if place.parent else "first"))
    played.reordered = sum("reordered" in turn.notes for turn in played.tree.turns)
    return played


def _with_ids(messages: Sequence[Message], ids: dict[str, str]) -> list[Message]:
    return [
        {
            **message,
            **({"tool_call_id": ids.get(message["tool_call_id"], message["tool_call_id"])}
               if "tool_call_id" in message else {}),
            **({"tool_calls": [{**call, "id": ids.get(call["id"], call["id"])}
                               for call in message["tool_calls"]]}
               if message.get("tool_calls") else {}),
        }
        for message in messages
    ]  # fmt: skip


def _sampled_text(answer: Message) -> str:
    """What a model writes that is read as this answer, with hermes calls."""
    thought = answer.get("reasoning_content")
    parts = [f"<think>\n{thought}\n</think>\n\n" if thought else "", answer["content"]]
    for call in answer.get("tool_calls", ()):
        function = call["function"]
        body = f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'
        parts.append(f"\n<tool_call>\n{body}\n</tool_call>")
    return "".join(parts)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _remember(ids: dict[str, str], answer: Message, turn: SessionTurn) -> None:
    recorded = [call["id"] for call in answer.get("tool_calls", ())]
    ids |= dict(zip(recorded, turn.call_ids, strict=len(turn.call_ids) == len(recorded)))


# ---------------------------------------------------------------------- the structure alone


class Reducer:
    """Replaces the texts of a session by words of ours; equal ones stay equal, others different."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._arguments: dict[str, int] = {}
        self._spellings: dict[str, list[str]] = {}
        self._names: dict[str, int] = {}
        self._ids: dict[str, int] = {}

    def session(self, steps: Session) -> Session:
        """The same requests, in words of ours."""
        return [
            {
                "messages": [self._message(one) for one in step["messages"]],
                "tools": [self._tool(one) for one in step["tools"]],
                "answer": self._message(step["answer"]),
            }
            for step in steps
        ]

    def _message(self, message: Message) -> Message:
        reduced: Message = {"role": message["role"], "content": self._text(message.get("content"))}
        if message.get("reasoning_content") is not None:
            reduced["reasoning_content"] = self._text(message["reasoning_content"])
        if "tool_call_id" in message:
            reduced["tool_call_id"] = self._id(message["tool_call_id"])
        if message.get("tool_calls"):
            reduced["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return reduced

    def _text(self, text: str | None) -> str | None:
        if not text or not text.strip():
            return text
        words = text.strip()
        start = text.index(words)
        number = self._texts.setdefault(words, len(self._texts))
        return f"{text[:start]}text {number}{text[start + len(words) :]}"

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {
            "id": self._id(call["id"]),
            "type": "function",
            "function": {
                "name": self._name(function["name"]),
                "arguments": self._spelt(function["arguments"]),
            },
        }

    def _spelt(self, text: str) -> str:
        """Arguments with another value for each value, and another spelling for each spelling."""
        try:
            value = json.dumps(json.loads(text), sort_keys=True)
        except ValueError:
            value = text
        number = self._arguments.setdefault(value, len(self._arguments))
        if not _is_object(text):
            return f'{{"n": {number}'
        spellings = self._spellings.setdefault(value, [])
        if text not in spellings:
            spellings.append(text)
        styles = ('{{"n": {0}}}', '{{"n":{0}}}', '{{ "n" : {0} }}', '{{"n":  {0}}}')
        return styles[spellings.index(text) % len(styles)].format(number)

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        known = json.dumps(tool, sort_keys=True)
        number = self._texts.setdefault(known, len(self._texts))
        name = self._name(tool["function"]["name"])
        return {"type": "function", "function": {"name": name, "description": f"tool {number}"}}

    def _name(self, name: str) -> str:
        return f"f{self._names.setdefault(name, len(self._names))}"

    def _id(self, call_id: str) -> str:
        return f"id_{self._ids.setdefault(call_id, len(self._ids))}"


def packed_sessions(sessions: dict[str, Session]) -> dict[str, Any]:
    """The sessions with each message and each list of tools once."""
    messages: dict[str, int] = {}
    tools: dict[str, int] = {}

    def place(table: dict[str, int], value: Any) -> int:
        return table.setdefault(json.dumps(value, sort_keys=True), len(table))

    files = {
        name: [
            [
                place(tools, step["tools"]),
                [place(messages, one) for one in step["messages"]],
                place(messages, step["answer"]),
            ]
            for step in steps
        ]
        for name, steps in sessions.items()
    }
    tables = {"messages": list(map(json.loads, messages)), "tools": list(map(json.loads, tools))}
    return {**tables, "files": files}


def unpacked_sessions(packed: dict[str, Any]) -> Iterator[tuple[str, Session]]:
    """The sessions of a fixture, by the name of their file."""
    messages, tools = packed["messages"], packed["tools"]
    for name, steps in packed["files"].items():
        yield (
            name,
            [
                {
                    "messages": [messages[place] for place in places],
                    "tools": tools[offered],
                    "answer": messages[answer],
                }
                for offered, places, answer in steps
            ],
        )


def main() -> None:
    from tests.helpers import hermes_template

    parser = argparse.ArgumentParser(prog="python -m tests.agent.gateway.traffic")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fixture", type=Path, help="write the sessions' structure here")
    options = parser.parse_args()
    template, total, reasons = hermes_template(), Counter[str](), Counter[str]()
    sessions: dict[str, Session] = {}
    table: dict[str, Any] = {}
    for file in sorted(options.folder.glob("*.jsonl")):
        steps = read_file(file)
        found = play(steps, template).summary()
        sessions[file.stem] = Reducer().session(steps)
        reduced = play(sessions[file.stem], template).summary()
        table[file.stem] = found
        note = "" if reduced == found else f"  STRUCTURE DIFFERS: {json.dumps(reduced)}"
        print(f"{file.stem:28} {json.dumps(found)}{note}")
        total["turns"] += found["turns"]
        total["continued"] += found["continued"]
        reasons.update(found["branches"])
    print(f"{len(table)} sessions, {dict(total)}, branches {dict(reasons)}")
    if options.fixture:
        document = {"table": table, **packed_sessions(sessions)}
        options.fixture.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
