"""The commands that take cases from outside the repository, each with a small file."""

from __future__ import annotations

import json
from pathlib import Path

from conversations.formats.format import NO_TYPES
from tests.conversations.templates import CHATML, CHATML_TOOLS
from tests.formats_peers import outcomes
from tests.formats_templates import digest, outcome_of, texts_in

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def test_a_peers_turns_are_exact_shown_or_told_apart(tmp_path: Path) -> None:
    cases = [
        {"format": "hermes", "input": CALL, "expected": [["f", {"x": 1}]]},
        {"input": CALL, "expected": {"calls": [["f", {"x": 1.0}]]}},
        {"input": f"a {CALL}", "expected": {"calls": None, "content": "a"}},
        {"input": f"a {CALL}", "expected": {"content": "a", "content_exact": False}},
        {"input": CALL[:30], "expected": [], "truncated": True},
        {"input": "text", "expected": [], "broken": True},
        {"input": f"{CALL}</think>a", "expected": [], "in_think": True},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    columns = [column for _, column, _ in outcomes(path, NO_TYPES)]
    assert columns == ["exact", "differs", "differs", "exact", "shown", "not shown", "exact"]


def test_templates_are_found_by_their_hash_and_tried_on_random_histories(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(CHATML_TOOLS + "\n")
    (tmp_path / "b.json").write_text(json.dumps({"models": [{"chat_template": CHATML}]}))
    (tmp_path / "c.json").write_text("{")
    texts = texts_in([tmp_path])
    row = {"sources": ["it"], "tokenizer": "qwen3", "own": "surrogate", "eos": "<|im_end|>"}
    outcome = outcome_of({**row, "hash": digest(CHATML_TOOLS)}, texts, 3)
    assert (outcome.kind, outcome.form, outcome.right) == ("accepted", "hermes, by its calls", 3)
    refused = outcome_of({**row, "hash": digest(CHATML)}, texts, 3)
    assert (refused.kind, refused.wrong) == ("refused", ())
    assert "tool" in refused.reason
    assert outcome_of({**row, "hash": "none"}, texts, 3).kind == "no text"


def test_a_template_that_loses_a_delta_is_accepted_wrongly() -> None:
    """A control: a text that depends on a word of the history which no probe has."""
    source = CHATML_TOOLS.replace(
        "{%- for m in messages %}",
        "{%- set ns = namespace(odd='') %}{%- for m in messages %}"
        "{%- if m.content.startswith('q ') %}{%- set ns.odd = '!' %}{%- endif %}",
    ).replace("m.role + '\\n'", "m.role + (ns.odd if m.role == 'tool' else '') + '\\n'")
    row = {"sources": ["it"], "tokenizer": "qwen3", "own": "surrogate", "eos": "<|im_end|>"}
    outcome = outcome_of({**row, "template": source}, {}, 3)
    assert (outcome.kind, len(outcome.wrong)) == ("accepted", 3)
