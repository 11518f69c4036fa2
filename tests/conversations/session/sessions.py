"""A client with a history of its own, and sessions that have branches of every kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from agent.engines.engine import Generation
from conversations.messages import Message
from conversations.run.store import RunFolder
from conversations.session import Place, SessionTree, SessionTurn
from conversations.template import ChatTemplate
from conversations.trajectory import Trajectory
from tests.helpers import call, logprobs, save_tokenizer_of

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "read", "description": "d", "parameters": {"type": "object"}},
}
ASK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is in the file?"},
]


class Client:
    """An agent program, and a model that says what it is told to."""

    def __init__(self, template: ChatTemplate, tools: list[dict[str, Any]] | None = None) -> None:
        self.tree = SessionTree(template)
        self.tools = [TOOL] if tools is None else tools
        self.history = copy.deepcopy(ASK)

    def match(self) -> Place:
        return self.tree.match(self.history, self.tools)

    def turn(self, text: str, finish_reason: str = "stop") -> SessionTurn:
        """Sends the history, and appends what comes back."""
        template = self.tree.template
        ids = template.encode(text)
        if finish_reason == "stop":
            ids = [*ids, template.end_id]
        turn = self.tree.add(
            self.match(),
            Generation(ids, logprobs(ids), finish_reason),
            response_id=f"r{len(self.tree.turns)}",
        )
        self.history.append(copy.deepcopy(turn.served))
        return turn

    def answer(self, turn: SessionTurn, *texts: str) -> None:
        for call_id, text in zip(turn.call_ids, texts, strict=True):
            self.history.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def user(self, text: str) -> None:
        self.history.append({"role": "user", "content": text})

    def record(self) -> Trajectory:
        return record_of_tree(self.tree)


def record_of_tree(tree: SessionTree) -> Trajectory:
    """The session as a gateway records it."""
    stop = tree.template.stop_token_ids
    return Trajectory(
        id="t-0", task_id="t", sample=0, stop_reason="stop", infra_error=False, error=None,
        warnings=[], reward=1.0, reward_parts={"agent": 1.0}, ground_truth=None,
        data_source=None, extra=None, engine={}, sampling={"stop_token_ids": stop},
        parent=None, started_at="2026-11-28T12:00:00+00:00", wall_s=0.0, **tree.record_fields(),
    )  # fmt: skip


def begun(client: Client) -> SessionTurn:
    """A session with one turn, which made a call that was answered."""
    turn = client.turn(call("read", path="a", lines=[1, 2]))
    client.answer(turn, "one\n")
    return turn


def branched(template: ChatTemplate) -> Client:
    """A session with a branch of each reason but `template`, a branch of a branch, a cut turn."""
    client = Client(template)
    begun(client)
    second = client.turn("<think>\nhm\n</think>\n\n" + call("read", path="b") + call("nobody"))
    client.answer(second, "two", "there is no such tool")
    client.user("And now?")
    client.turn("It is cut", "length")
    client.user("Go on.")
    client.turn("Done.")
    for text in ("More?", "Still more?"):
        client.user(text)
        client.turn("No.")
    known = copy.deepcopy(client.history)
    client.history = known[:4]
    client.turn("Another sample.")
    client.user("Why?")
    client.turn("Because.")
    after = copy.deepcopy(client.history)
    client.history[-1:] = [{"role": "assistant", "content": "My own."}, ASK[1]]
    client.turn("Of a branch.")
    client.history = [*after[:-2], {"role": "user", "content": "Why not?"}]
    client.turn("Edited.")
    client.history = [*known[:4], {"role": "user", "content": "Tool call error."}]
    client.turn('<tool_call>{"name": "read", oops</tool_call>')
    client.history = [known[0], {"role": "user", "content": "A sub-agent's question."}]
    client.turn("New.")
    client.history = [{"role": "system", "content": "Be loud."}, *known[1:2]]
    client.turn("SYSTEM!")
    client.history, client.tools = known[:2], []
    client.turn("No tools.")
    return client


def session_run(path: Path, template: ChatTemplate) -> Path:
    """A run folder with one session: `branched`."""
    rollout: dict[str, Any] = {"name": "sglang", "prompt_length": 4096, "response_length": 4096}
    rollout |= {"max_model_len": 8192, "multi_turn": {"enable": True, "max_assistant_turns": 64}}
    config = {"model_path": "smollm2-base", "rollout": rollout}
    manifest = {"gateway": True, "config": config, "counts": {"asked": 1, "done": 1}}
    with RunFolder.create(path, manifest) as folder:
        save_tokenizer_of(template, path / "tokenizer")
        folder.append(branched(template).record())
    return path
