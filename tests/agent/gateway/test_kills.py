"""A gateway that is killed loses no turn and gives none twice. `python -m tests.gateway_kills 20`
does it twenty times with 32 sessions.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conversations.errors import RunFolderError
from conversations.run.store import JOURNAL
from tests.agent.gateway.live import Obedient, checked, live
from tests.agent.gateway.program import Program, told
from tests.gateway_kills import kill_all


def test_two_kills_under_load_lose_nothing(tmp_path: Path) -> None:
    counts = kill_all(tmp_path / "run", kills=2, sessions=8, turns=25, every_s=0.2)
    assert counts.retries > 0


def test_a_stopped_gateway_goes_on_with_its_sessions(tmp_path: Path) -> None:
    """Ctrl-C: what did not end is in unfinished.jsonl, and goes on where it stood."""
    with live(tmp_path, engine=Obedient()) as gateway:
        port = gateway.server.url.rpartition(":")[2]
        program = Program.of(gateway, task_id="t", ground_truth=4, extra={"a": 1})
        first = program.say("say one").json()["choices"][0]["message"]
    assert (tmp_path / "unfinished.jsonl").read_text().count("\n") == 1
    with live(tmp_path, engine=Obedient(), resume=True, port=int(port)) as gateway:
        assert gateway.restored == 1
        history = [
            {"role": "user", "content": "say one"},
            first,
            {"role": "user", "content": "say two"},
        ]
        assert told("chat", program.ask("chat", {"messages": history})) == "two"
        program.finish()
    record = checked(tmp_path).only
    assert (record.num_turns, record.branches) == (2, [])
    assert (record.ground_truth, record.extra) == (4, {"a": 1})
    assert (tmp_path / "unfinished.jsonl").read_text() == ""


def test_a_torn_line_of_the_journal_is_cut_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        program = Program.of(gateway)
        program.say("say one")
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"kind": "turn", "name": "torn')
    with live(tmp_path, engine=Obedient(), resume=True) as gateway:
        assert gateway.restored == 1
    journal.write_bytes(b"{}\n" + whole)
    with (
        pytest.raises(RunFolderError, match=r"turns.jsonl:1"),
        live(tmp_path, engine=Obedient(), resume=True),
    ):
        pass
