"""A gateway over SGLang servers: a session stays with one, and moves when that one is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.engines import servers as sglang_servers
from agent.engines.servers import SGLangServerEngine
from tests.agent.gateway.live import checked, live
from tests.agent.gateway.program import Program
from tests.agent.native_api import Server, answers, in_a_thread, status


def talk(program: Program, turns: int) -> None:
    history: list[Any] = []
    for turn in range(turns):
        history.append({"role": "user", "content": f"{program.name} {turn}"})
        answer = program.ask("chat", {"messages": history})
        assert answer.status_code == 200, answer.text
        history.append(answer.json()["choices"][0]["message"])


def owners(server: Server, programs: list[Program], ids_of: Any) -> set[str]:
    texts = [ids_of(body["input_ids"]) for body in server.bodies]
    return {one.name for one in programs for text in texts if f"{one.name} 0" in text}


def test_sessions_spread_over_servers_and_each_stays_where_its_prefix_is(tmp_path: Path) -> None:
    with in_a_thread(Server(answers)) as one, in_a_thread(Server(answers)) as two:
        engine = SGLangServerEngine([one.url, two.url])
        with live(tmp_path, engine=engine) as gateway:
            programs = [Program.of(gateway) for _ in range(4)]
            for program in programs:
                talk(program, 3)
            for program in programs:  # a session that has ended may leave its server at once
                program.finish()
            decode = gateway.sessions.runtime.template.decode
            first, second = (owners(server, programs, decode) for server in (one, two))
    assert (len(first), len(second), first & second) == (2, 2, set())
    assert {len(server.bodies) for server in (one, two)} == {6}
    checked(tmp_path)


def test_a_session_whose_server_fails_goes_on_at_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_servers, "FIRST_BACKOFF_S", 0.01)
    fails = Server(answers, status(500, {"error": "x"}), status(500, {}), answers)
    with (
        in_a_thread(fails) as one,
        live(tmp_path, engine=SGLangServerEngine([one.url])) as gateway,
    ):
        program = Program.of(gateway)
        talk(program, 2)
        program.finish()
    assert checked(tmp_path).only.num_turns == 2
