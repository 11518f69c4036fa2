"""Retries are told by delivery: an answer that its client did not get is given again, one that it
got never is.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.gateway import Gateway, session
from agent.gateway.chat import CHAT
from agent.gateway.request import Refusal
from agent.loop.tasks import Task
from tests.agent.gateway.live import Obedient, checked, live
from tests.agent.gateway.program import DIALECTS, PATHS, Program, body_of, told


@pytest.fixture
def engine() -> Obedient:
    return Obedient()


@pytest.fixture
def gateway(engine: Obedient, tmp_path: Path) -> Iterator[Gateway]:
    with live(tmp_path, engine=engine) as running:
        yield running


def raw_request(program: Program, dialect: str, body: Any) -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"POST {PATHS[dialect]} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {program.key}\r\n"
        f"content-length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


def connected(program: Program) -> socket.socket:
    host, port = program.gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_client_that_goes_at_any_byte_gets_the_same_turn(
    gateway: Gateway, engine: Obedient, dialect: str, stream: bool, tmp_path: Path
) -> None:
    """At every byte of the answer but the last; after the last one it gets another sample."""
    program = Program.of(gateway)
    body = body_of(dialect, "say x", stream=stream)
    with connected(program) as client:
        client.sendall(raw_request(program, dialect, body))
        whole = _whole_answer(client)
    assert engine.asked == 1
    program.finish()
    again = Program.of(gateway)
    for length in range(0, len(whole), 1 if len(whole) < 700 else 7):
        with connected(again) as client:
            client.sendall(raw_request(again, dialect, body))
            _read_exactly(client, length)
            assert client.recv(1, socket.MSG_PEEK)  # the answer is there, and stays unread
    assert engine.asked == 2  # one turn for all of them
    assert again.ask(dialect, body).status_code == 200
    assert engine.asked == 2
    assert again.ask(dialect, body).status_code == 200
    assert engine.asked == 3  # delivered: the same prompt is a wish for another sample
    assert len(again.finish()["branches"]) == 1
    gateway.close()
    checked(tmp_path)


def _read_exactly(client: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        found += client.recv(length - len(found))
    return found


def _whole_answer(client: socket.socket) -> bytes:
    found = b""
    while b"\r\n\r\n" not in found:
        found += client.recv(65536)
    head, _, body = found.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    return found + _read_exactly(client, length - len(body))


def test_who_asks_again_on_the_connection_has_read_the_last_answer(
    gateway: Gateway, engine: Obedient
) -> None:
    program = Program.of(gateway)
    with connected(program) as client:
        client.sendall(raw_request(program, "chat", body_of("chat", "say x")))
        _whole_answer(client)
        client.sendall(raw_request(program, "chat", body_of("chat", "say wait")))
        _until(lambda: engine.asked == 2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    engine.gate.set()
    _until(lambda: _health(gateway)["in_flight"] == 0)
    program.say("say x")
    assert engine.asked == 3  # another sample
    assert told("chat", program.say("say wait")) == "wait"
    assert engine.asked == 3  # this one was lost


def test_a_client_that_goes_while_the_engine_works_finds_its_turn(
    gateway: Gateway, engine: Obedient, tmp_path: Path
) -> None:
    """In another dialect and without a stream, as Claude Code asks after an error."""
    program = Program.of(gateway)
    with connected(program) as client:
        client.sendall(raw_request(program, "chat", body_of("chat", "say wait", stream=True)))
        _until(lambda: engine.asked == 1)
    retry = _in_thread(lambda: program.ask("anthropic", body_of("anthropic", "say wait")))
    _until(lambda: _health(gateway)["in_flight"] == 1)
    engine.gate.set()
    assert told("anthropic", retry()) == "wait"
    assert (engine.asked, engine.aborted) == (1, 0)
    assert program.finish()["turns"][0]["notes"] == []


def test_an_answer_that_nobody_fetched_is_undelivered(
    gateway: Gateway, engine: Obedient, tmp_path: Path
) -> None:
    program = Program.of(gateway)
    with connected(program) as client:
        client.sendall(raw_request(program, "chat", body_of("chat", "say wait")))
        _until(lambda: engine.asked == 1)
    engine.gate.set()
    _until(lambda: _health(gateway)["turns"] == 1)
    assert program.finish()["turns"][0]["notes"] == ["undelivered"]
    gateway.close()
    checked(tmp_path)


def test_a_turn_that_nobody_waits_for_is_aborted_after_a_while(
    gateway: Gateway, engine: Obedient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GONE_S", 0.05)
    program = Program.of(gateway)
    with connected(program) as client:
        client.sendall(raw_request(program, "chat", body_of("chat", "say wait")))
        _until(lambda: engine.asked == 1)
    _until(lambda: engine.aborted == 1)
    engine.gate.set()
    assert told("chat", program.say("say wait")) == "wait"
    assert (engine.asked, len(program.finish()["turns"])) == (2, 1)


def test_two_equal_requests_with_both_clients_there_are_two_samples(
    gateway: Gateway, engine: Obedient, tmp_path: Path
) -> None:
    program = Program.of(gateway)
    asked = [_in_thread(lambda: program.say("say wait", max_tokens=64)) for _ in range(2)]
    _until(lambda: engine.asked == 2)
    engine.gate.set()
    first, second = (one().json()["id"] for one in asked)
    assert first != second
    record = program.finish()
    assert [branch["reason"] for branch in record["branches"]] == ["resampled"]
    gateway.close()
    checked(tmp_path)


def test_a_retry_by_an_sdk_gets_the_last_answer_though_it_was_delivered(
    gateway: Gateway, engine: Obedient
) -> None:
    program = Program.of(gateway)
    first = program.say("say x").json()
    again = program.ask("chat", body_of("chat", "say x"), **{"x-stainless-retry-count": "1"})
    other = program.ask("chat", body_of("chat", "say x"), **{"x-stainless-retry-count": "0"})
    assert again.json()["id"] == first["id"] != other.json()["id"]
    assert engine.asked == 2


def test_two_programs_on_one_key_never_mix(
    gateway: Gateway, engine: Obedient, tmp_path: Path
) -> None:
    """Each goes on with its own conversation; the record has both."""
    program = Program.of(gateway)
    histories: list[list[Any]] = [[], []]
    for turn in range(3):
        for name, history in zip("ab", histories, strict=True):
            history.append({"role": "user", "content": f"say {name}{turn}"})
            answer = program.ask("chat", {"messages": history}).json()
            message = answer["choices"][0]["message"]
            assert message["content"] == f"{name}{turn}"
            history.append(message)
    record = program.finish()
    assert (len(record["turns"]), len(record["branches"][0]["turns"])) == (3, 3)
    assert record["branches"][0]["reason"] == "new"
    gateway.close()
    checked(tmp_path)


def test_a_client_that_never_replays_its_history_is_told_so(tmp_path: Path) -> None:
    async def ask_all() -> str:
        running = gateway.sessions.open(Task("rewrites", []))[0]
        running.max_branches = 3
        for number in range(9):
            request = CHAT.read(json.dumps(body_of("chat", f"say {number}")).encode())
            try:
                answering = await running.begin(request, CHAT, {})
            except Refusal as refusal:
                return f"{number} {refusal.message}"
            await answering.task
        return "never"

    with live(tmp_path, engine=Obedient()) as gateway:
        message = gateway.session_loop.run(ask_all())
    assert message == "4 this session has 3 branches: the client does not replay history"


# ---------------------------------------------------------------------- small things


def _health(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{gateway.url}/health").json()
    return found


def _until(condition: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen within 30 s")


def _in_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def result() -> Any:
        thread.join(60)
        return found[0]

    return result
