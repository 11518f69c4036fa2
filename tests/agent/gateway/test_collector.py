"""The event loop is not stopped by Python's garbage collector, and nothing leaks for it."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from pathlib import Path

import orjson
import pytest

from agent.gateway import collector
from agent.gateway.journal import turn_line
from tests.agent.gateway.live import live, then
from tests.agent.gateway.program import Program


def test_what_lives_is_frozen_while_a_gateway_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "FREEZE_EVERY_S", 0.01)
    before = gc.get_freeze_count()
    with live(tmp_path, then("Hello.")) as gateway:
        program = Program.of(gateway)
        program.say("hi")
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_a_gateway_that_is_always_busy_thaws_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "FREEZE_EVERY_S", 0.01)
    monkeypatch.setattr(collector, "THAW_EVERY_S", 0.0)
    monkeypatch.setattr(collector, "THAW_AT_LATEST_S", 0.05)

    async def frees() -> None:
        tended, cycle = collector.Collector(lambda: True), Cycle()
        left = weakref.ref(cycle)
        tended.start()
        try:
            del cycle
            async with asyncio.timeout(30):
                while left():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            tended.stop()

    asyncio.run(frees())


def test_the_turns_of_a_session_that_ended_need_no_collector(tmp_path: Path) -> None:
    with live(tmp_path, then("One.", "Two.")) as gateway:
        program = Program.of(gateway)
        program.say("hi")
        program.say("hi")  # a branch: siblings too
        (session,) = gateway.sessions.live
        turns = [weakref.ref(turn.sampled.ids) for turn in session.turns]
        program.finish()
        del session
        gc.disable()
        try:
            Program.of(gateway).say("another")  # the loop lets go of the last request
            assert [turn() for turn in turns] == [None, None]
        finally:
            gc.enable()


@pytest.mark.parametrize("odd", ["\ud83d", 1 << 70])
def test_a_turn_has_a_line_in_the_journal_whatever_its_client_sent(odd: object) -> None:
    entry = {"client": {"user-agent": odd}, "logprobs": [-0.1, -1e-7], "given": "é\u2028"}
    line = turn_line("s", 0.5, entry)
    assert b"\n" not in line
    assert json.loads(line)["entry"] == entry


def test_log_probs_keep_all_of_their_digits_in_the_journal() -> None:
    values = [-0.12345679104328156, -5e-324, -17.0, -1.1920929e-07]
    line = turn_line("s", 0.5, {"logprobs": values})
    assert orjson.loads(line)["entry"]["logprobs"] == values
