"""A record's warnings: a kind from a closed set, and a text for people.

Invariant: code decides by `kind` alone, so the text may be reworded at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WarningKind = Literal[
    "control_tokens",
    "history_rewritten",
    "unknown_ids",
    "unknown_tool_kwargs",
    "release_failed",
    "no_interactions",
    "user_failed",
    "over_sampled",
    "refused_requests",
    "resumed",
    "tools_differ",
    "user_differs",
    "partial",
    "imported",
    "unproven",
    "other",
]

KINDS: dict[WarningKind, str] = {
    "control_tokens": "a tool's response contains the text of control tokens",
    "history_rewritten": "the chat template rewrites earlier turns; the sampled tokens were kept",
    "unknown_ids": "the model sampled ids that the tokenizer does not have",
    "unknown_tool_kwargs": "the task's tools_kwargs name a tool that the run does not have",
    "release_failed": "a tool's release failed",
    "no_interactions": "the task's interaction_kwargs choose a user, and the run has none",
    "user_failed": "a simulated user failed",
    "over_sampled": "the conversation was interrupted because enough others were done",
    "refused_requests": "a gateway refused requests of the session: too long, or not renderable",
    "resumed": "the conversation was interrupted at a token and resumed there",
    "tools_differ": "a tool answered differently when its recorded calls were made again",
    "user_differs": "a simulated user answered differently when asked again",
    "partial": "the record holds only those parts of a failed conversation that have a JSON form",
    "imported": "the source of an import lacks something, or has it in another form",
    "unproven": "the messages of an import do not match its tokens, and are not compared with them",
    "other": "a warning of a turntrace/1 record that has no kind",
}
"""Every kind and its meaning."""


@dataclass(frozen=True, slots=True)
class RecordWarning:
    """One warning of a record. `text` is one line."""

    kind: WarningKind
    text: str
