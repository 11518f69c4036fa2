"""Recorded traffic of fourteen agent programs, its structure alone: what each request does.

`traffic.json` is made by `python -m tests.agent.gateway.traffic FOLDER --fixture FILE`, which also
prints the table of the traffic itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversations.branches import Totals, rows
from conversations.checks.facts import RunFacts
from conversations.checks.record import check_line
from tests.agent.gateway.traffic import play, unpacked_sessions
from tests.conversations.session.sessions import record_of_tree
from tests.helpers import hermes_template

FIXTURE = json.loads(Path(__file__).with_name("traffic.json").read_text(encoding="ascii"))
SESSIONS = dict(unpacked_sessions(FIXTURE))


def test_the_table_adds_up() -> None:
    """Every turn that can be continued is: the others are branches for a reason that was read."""
    table = FIXTURE["table"].values()
    assert len(table) == 40
    assert sum(row["turns"] for row in table) == 188
    assert sum(row["continued"] for row in table) == 121


@pytest.mark.parametrize("name", SESSIONS)
def test_a_recorded_session(name: str) -> None:
    template = hermes_template()
    played = play(SESSIONS[name], template)
    assert played.summary() == FIXTURE["table"][name]
    record = record_of_tree(played.tree)
    facts = RunFacts(template=template, is_gateway=True)
    line = f"{record.to_line()}\n".encode()
    assert [finding.what for finding in check_line(line, facts).findings] == []
    trained = sum(sum(row.trajectory.response_mask) for row in rows(record))
    assert trained == played.tree.sampled_length == Totals.of(record).sampled_tokens
