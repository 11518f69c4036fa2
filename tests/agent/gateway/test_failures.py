"""What a gateway answers when something is wrong: each row of the table in agent/gateway/README.md,
and that a session goes on afterwards where it can.
"""

from __future__ import annotations

import json
import math
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.errors import AgentError
from agent.gateway import Gateway
from agent.gateway.answer import AnsweredCall, json_bytes
from agent.gateway.chat import CHAT
from agent.gateway.request import MAX_BODY_BYTES, Refusal, TurnRequest
from agent.loop.tasks import Task
from agent.model.base import base_model_dir
from conversations.errors import RunFolderError
from conversations.run.store import JOURNAL
from conversations.template import ChatTemplate
from conversations.trajectory import STOP_REASONS, Trajectory
from tests.agent.gateway.live import Obedient, checked, gateway_config_of, live
from tests.agent.gateway.program import DIALECTS, PATHS, Program, body_of, problem, told
from tests.helpers import fresh_tokenizer


@pytest.fixture(scope="module")
def engine() -> Obedient:
    return Obedient()


@pytest.fixture(scope="module")
def gateway(engine: Obedient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for tests that leave it as it was; its run is checked at the end."""
    out = tmp_path_factory.mktemp("gateway")
    with live(out, engine=engine) as running:
        yield running
    checked(out)


# ---------------------------------------------------------------------- requests

DEEP = b'{"model": "m", "metadata": ' + b"[" * 100_000
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}
BAD_CHAT = {
    "messages: Field required": {"model": "m"},
    "there are none": {"messages": []},
    "messages: Input": {"messages": "hello"},
    "'robot' is unknown": {"messages": [{"role": "robot", "content": "x"}]},
    "sees no images": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "only system messages": {"messages": [{"role": "system", "content": "x"}]},
    "n: one answer": body_of("chat", "x", n=2),
    "response_format: 'json_schema'": body_of("chat", "x", response_format={"type": "json_schema"}),
    "max_tokens: must be 1": body_of("chat", "x", max_tokens=0),
    "send them as tools": body_of("chat", "x", functions=[{"name": "f"}]),
    "a tool needs a name": body_of("chat", "x", tools=[{"type": "function", "function": {}}]),
    "tool_call_id: is missing": {"messages": [{"role": "tool", "content": "x"}]},
}
BAD_ANTHROPIC = {
    "messages: Field required": {"model": "m"},
    "'tool' is unknown": {"messages": [{"role": "tool", "content": "x"}]},
    "of type none is not followed": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}]
    },
    "output_format: 'json_schema'": body_of(
        "anthropic", "x", output_format={"type": "json_schema"}
    ),
}
BAD_RESPONSES = {
    "input: Field required": {"model": "m"},
    "item of type 'item_reference'": {"input": [{"type": "item_reference", "id": "x"}]},
    "text.format: 'json_schema'": body_of(
        "responses", "x", text={"format": {"type": "json_schema"}}
    ),
    "background:": body_of("responses", "x", background=True),
    "no response 'resp_0'": body_of("responses", "x", previous_response_id="resp_0"),
}
BAD = [
    *(("chat", text, body) for text, body in BAD_CHAT.items()),
    *(("anthropic", text, body) for text, body in BAD_ANTHROPIC.items()),
    *(("responses", text, body) for text, body in BAD_RESPONSES.items()),
]


@pytest.mark.parametrize(("dialect", "text", "body"), BAD, ids=[f"{d}: {t}" for d, t, _ in BAD])
def test_a_bad_request_is_refused_by_name(
    gateway: Gateway, dialect: str, text: str, body: Any
) -> None:
    program = Program.of(gateway)
    status, message = problem(dialect, program.ask(dialect, body))
    assert text in message
    assert status == (404 if "resp_0" in text else 400)
    assert program.finish()["turns"] == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", DEEP, b'{"model": NaN}'])
def test_hostile_json_is_refused(gateway: Gateway, dialect: str, raw: bytes) -> None:
    program = Program.of(gateway)
    answer = httpx.post(
        f"{gateway.url}{PATHS[dialect]}", content=raw, headers=program.headers, timeout=60
    )
    assert problem(dialect, answer)[0] == 400


INFINITE = {
    "asked": {"temperature": "N"},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "N"}}}]},
    "arguments": {
        "messages": [
            {"role": "user", "content": "say x"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"a": "N"}}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ]
    },
}


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
@pytest.mark.parametrize("place", INFINITE)
def test_an_infinite_number_is_refused_before_the_turn(
    gateway: Gateway, engine: Obedient, place: str, number: str
) -> None:
    program, asked = Program.of(gateway), engine.asked
    body = json.dumps({**body_of("chat", "say x"), **INFINITE[place]}).replace('"N"', number)
    answer = httpx.post(
        f"{gateway.url}{PATHS['chat']}", content=body, headers=program.headers, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert engine.asked == asked
    assert told("chat", program.say("say on")) == "on"


def test_integers_of_any_size_are_answered() -> None:
    call = AnsweredCall("c", "f", '{"a": 18446744073709551616}')
    assert json.loads(json_bytes(call.object())) == {"a": 1 << 64}


def test_half_characters_and_deep_values_are_not_hostile(gateway: Gateway) -> None:
    """JavaScript programs cut texts within a character, and send it."""
    program = Program.of(gateway)
    raw = b'{"messages": [{"role": "user", "content": "say \\ud83d \\\\ud83d \\ud83d\\ude00"}]}'
    answer = httpx.post(
        f"{gateway.url}{PATHS['chat']}", content=raw, headers=program.headers, timeout=60
    )
    assert told("chat", answer) == "\ufffd \\ud83d 😀"


def test_a_body_over_the_limit_is_413_and_the_gateway_goes_on(gateway: Gateway) -> None:
    program = Program.of(gateway)
    pieces = (b" " * (1 << 20) for _ in range((MAX_BODY_BYTES >> 20) + 1))
    try:
        answer = httpx.post(
            f"{gateway.url}/v1/messages", content=pieces, headers=program.headers, timeout=60
        )
        assert problem("anthropic", answer)[0] == 413
    except httpx.WriteError:  # the answer came, and the connection was closed, before the last byte
        pass
    assert told("chat", program.say("say still here")) == "still here"


def test_a_body_that_says_it_is_over_the_limit_is_not_read(gateway: Gateway) -> None:
    program = Program.of(gateway)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {program.key}\r\n"
        client.sendall(f"{head}content-length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


# ---------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_unknown_key_is_401(gateway: Gateway, dialect: str) -> None:
    for headers in ({}, {"authorization": "Bearer nobody"}, {"x-api-key": "\xff nobody"}):
        answer = httpx.post(
            f"{gateway.url}{PATHS[dialect]}",
            json=body_of(dialect, "x"),
            headers={name: value.encode("latin-1") for name, value in headers.items()},
        )
        assert problem(dialect, answer)[0] == 401


def test_a_session_is_found_by_key_and_else_by_path(gateway: Gateway) -> None:
    one, other = Program.of(gateway), Program.of(gateway)
    url = f"{gateway.url}/s/{one.name}/v1/chat/completions"
    body = body_of("chat", "say x")
    by_path = httpx.post(url, json=body).json()
    by_key = httpx.post(url, json=body, headers={"x-api-key": other.key}).json()
    assert one.name in by_path["id"]
    assert other.name in by_key["id"]
    assert httpx.post(f"{gateway.url}/s/nobody/v1/chat/completions", json=body).status_code == 404


def test_an_open_gateway_makes_a_session_of_an_unknown_key(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient(), open_to_all=True) as gateway:
        program = Program(gateway, "", "sk-anything")
        first, second = program.say("say x").json(), program.say("say y").json()
        assert first["id"].rpartition("-")[0] == second["id"].rpartition("-")[0]
        name = first["id"].split("-")[1]
        Program(gateway, name, "").finish()
    assert checked(tmp_path).only.branches[0].reason == "new"


def test_elsewhere_than_on_loopback_a_key_is_needed(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="--admin-key"):
        Gateway(gateway_config_of(), tmp_path, host="0.0.0.0")
    with live(tmp_path, engine=Obedient(), host="0.0.0.0", admin_key="secret") as gateway:
        url = gateway.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(f"{url}/sessions", json={}).status_code == 401
        wrong = httpx.post(f"{url}/sessions", json={}, headers={"x-api-key": "secreT"})
        assert wrong.status_code == 401
        opened = httpx.post(f"{url}/sessions", json={}, headers={"x-api-key": "secret"}).json()
        path = f"{url}/s/{opened['id']}/v1/chat/completions"
        assert httpx.post(path, json=body_of("chat", "say x")).status_code == 401
        key = {"authorization": f"Bearer {opened['api_key']}"}
        assert httpx.post(path, json=body_of("chat", "say x"), headers=key).status_code == 200


def test_a_web_page_may_not_ask(gateway: Gateway) -> None:
    origin = {"origin": "https://example.com"}
    assert httpx.post(f"{gateway.url}/sessions", json={}, headers=origin).status_code == 403


# ---------------------------------------------------------------------- routes that are no turns


def test_routes_beside_turns(gateway: Gateway) -> None:
    url = gateway.url
    assert httpx.head(f"{url}/").status_code == 200
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok"
    assert {"loop_lag_ms", "sessions", "turns", "branches", "in_flight"} < set(health)
    listed = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert listed["max_model_len"] == listed["context_window"] == 32768
    assert httpx.get(f"{url}/v1/models/any-name").json()["id"] == "any-name"
    for path in ("/v1/embeddings", "/nothing", "/v1/messages/batches"):
        assert httpx.post(f"{url}{path}", json={}).status_code == 404
    assert httpx.get(f"{url}/v1/messages").json()["error"]["type"] == "not_found_error"


def test_count_tokens_is_the_true_count_and_no_turn(gateway: Gateway) -> None:
    program = Program.of(gateway)
    body = body_of("anthropic", "say one two three")
    counted = httpx.post(
        f"{gateway.url}/v1/messages/count_tokens?beta=true", json=body, headers=program.headers
    ).json()
    usage = program.ask("anthropic", body).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"]}
    assert len(program.finish()["turns"]) == 1


def test_two_sessions_of_one_task_and_sample_are_refused(gateway: Gateway) -> None:
    program = Program.of(gateway, task_id="once")
    again = httpx.post(f"{gateway.url}/sessions", json={"task_id": "once"})
    assert again.status_code == 409
    Program.of(gateway, task_id="once", sample=1)
    program.finish()
    assert httpx.post(f"{gateway.url}/sessions", json={"task_id": "once"}).status_code == 409


def test_a_session_ends_once(gateway: Gateway) -> None:
    program = Program.of(gateway)
    url = f"{gateway.url}/sessions/{program.name}"
    for outcome in (
        '{"reward": "high"}',
        '{"reward": 1e400}',
        '{"stop_reason": "bored"}',
        '{"reward_parts": {"a": null}}',
        '{"reward": 1, "reward_parts": {"a": 2}}',
        '{"reward_parts": {"a": 1.7e308, "b": 1.7e308}}',
        f'{{"reward": {"9" * 400}}}',
        '{"rewrad": 1}',
        '{"stop_reason": "cancelled"}',
    ):
        assert httpx.post(f"{url}/finish", content=outcome).status_code == 400
    program.say("say x")
    record = program.finish(reward_parts={"a": 0.25, "b": 0.5}, extra={"notes": [1]})
    assert (record["reward"], record["extra"]) == (0.75, {"session": {"notes": [1]}})
    assert httpx.post(f"{url}/finish", json={}).status_code == 400
    assert problem("chat", program.say("say x")) == (400, "this session is finished")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"task": "t"}, "task: is unknown; known are task_id, sample"),
        ({"sample": 10**30}, "sample: "),
        ({"sample": -1}, "sample: "),
        ({"task_id": ""}, "task_id: "),
    ],
)
def test_a_session_that_cannot_be_opened_is_refused_by_name(
    gateway: Gateway, body: dict[str, Any], says: str
) -> None:
    before = len(gateway.sessions.live)
    answer = httpx.post(f"{gateway.url}/sessions", json=body)
    assert (answer.status_code, answer.json()["error"]["message"][: len(says)]) == (400, says)
    assert len(gateway.sessions.live) == before


async def test_an_end_that_no_record_can_hold_is_refused_and_the_session_goes_on(
    tmp_path: Path,
) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        kept, ended = await gateway.open("kept"), await gateway.open("ended")
        for session in (kept, ended):
            assert told("chat", Program(gateway, session.id, session.api_key).say("say x")) == "x"
            with pytest.raises(AgentError, match="JSON"):
                await session.finish(1.0, stop_reason="length", extra=math.nan)
        record = await ended.finish(0.5)
        assert (record.reward, record.stop_reason, record.extra) == (0.5, "stop", None)
    (line,) = (tmp_path / "unfinished.jsonl").read_text().splitlines()
    assert json.loads(line)["reward"] is None


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("reason", [one for one in STOP_REASONS if one != "cancelled"])
def test_a_session_may_end_for_any_reason_but_cancelled(
    tmp_path: Path, reason: str, turns: int
) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        for infra_error in (False, True):
            program = Program.of(gateway)
            for _ in range(turns):
                program.say("say x")
            record = program.finish(stop_reason=reason, reward=1.0, infra_error=infra_error)
            failed = infra_error or reason == "engine_error"
            assert (record["stop_reason"], record["infra_error"]) == (reason, failed)
            assert record["reward"] == (None if failed else 1.0)
    assert len(checked(tmp_path).trajectories) == 2


async def test_code_in_python_is_told_what_is_no_end(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        session = await gateway.open("t")
        for reason in ("bored", "cancelled"):
            with pytest.raises(AgentError, match=reason):
                await session.finish(1.0, stop_reason=reason)
        assert (await session.finish(1.0)).stop_reason == "stop"


def test_an_aborted_session_is_unfinished(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        program = Program.of(gateway)
        program.say("say x")
        assert httpx.delete(f"{gateway.url}/sessions/{program.name}").status_code == 200
        assert problem("chat", program.say("say x"))[0] == 400
    assert (tmp_path / "unfinished.jsonl").read_text().count("\n") == 1
    assert not (tmp_path / "trajectories.jsonl").exists()


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("rollout", "reason"),
    [
        ({"multi_turn.max_assistant_turns": 1}, "max_turns"),
        ({"response_length": 3}, "length"),
        ({"turntrace.session_length": 3}, "length"),
        ({"turntrace.conversation_deadline_s": 0.000001}, "deadline"),
    ],
)
def test_a_used_up_budget_is_400_and_the_stop_reason(
    rollout: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with live(tmp_path, engine=Obedient(), config=gateway_config_of(**rollout)) as gateway:
        program = Program.of(gateway)
        if reason != "deadline":
            program.say("say one two three four five")
        for dialect in DIALECTS:
            answer = program.ask(dialect, body_of(dialect, "say more"))
            status, message = problem(dialect, answer)
            assert (status, f"({reason})" in message) == (400, True)
        assert program.finish()["stop_reason"] == reason
    checked(tmp_path)


def test_a_session_may_have_more_tokens_than_the_model_has_room(tmp_path: Path) -> None:
    """Programs that compact begin anew; each sequence fits, the session is longer."""
    config = gateway_config_of(
        prompt_length=200,
        response_length=200,
        **{"turntrace.session_length": 2000, "multi_turn.max_assistant_turns": 99},
    )
    with live(tmp_path, engine=Obedient(), config=config) as gateway:
        program = Program.of(gateway)
        for name in ("one", "two", "three", "four"):
            body = body_of("chat", f"say {name} " + "and more " * 120)
            assert program.ask("chat", body).status_code == 200
        record = program.finish()
    assert record["stop_reason"] == "stop"
    kept = checked(tmp_path).only
    sequences = [kept, *kept.branches]
    assert len(sequences) == 4
    lengths = [len(each.prompt_ids) + len(each.response_ids) for each in sequences]
    assert max(lengths) <= 400 < sum(lengths)


def test_turns_that_are_being_sampled_count_as_turns(tmp_path: Path) -> None:
    engine = Obedient()
    config = gateway_config_of(**{"multi_turn.max_assistant_turns": 1})

    async def ask_both() -> Refusal:
        running = gateway.sessions.open(Task("parallel", []))[0]
        first = await running.begin(read("say wait"), CHAT, {})
        with pytest.raises(Refusal) as refused:
            await running.begin(read("say more"), CHAT, {})
        engine.gate.set()
        await first.task
        return refused.value

    def read(said: str) -> TurnRequest:
        return CHAT.read(json.dumps(body_of("chat", said)).encode())

    with live(tmp_path, engine=engine, config=config) as gateway:
        refused = gateway.session_loop.run(ask_both())
    assert (refused.status, refused.code) == (503, "busy")
    assert refused.retry_after_s


def test_an_answer_is_not_given_again_after_the_end(tmp_path: Path) -> None:
    async def ask_again() -> None:
        running = gateway.sessions.open(Task("ends", []))[0]
        request = CHAT.read(json.dumps(body_of("chat", "say x")).encode())
        await (await running.begin(request, CHAT, {})).task
        again = await running.begin(request, CHAT, {}, is_retry=True)
        await running.close(Refusal("it is over"))
        with pytest.raises(Refusal, match="it is over"):
            await again.task

    with live(tmp_path, engine=Obedient()) as gateway:
        gateway.session_loop.run(ask_again())


def test_a_session_that_cannot_be_kept_does_not_keep_the_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def append(record: Trajectory) -> None:
        tried.append(record.task_id)
        raise RunFolderError("the disk is full")

    with live(tmp_path, engine=Obedient()) as gateway:
        for name in ("a", "b"):
            Program.of(gateway, task_id=name)
        with monkeypatch.context() as patched:
            patched.setattr(gateway.folder, "append_unfinished", append)
            with pytest.raises(RunFolderError):
                gateway.session_loop.run(gateway.sessions.close())
    assert tried == ["a", "b"]


def test_a_deadline_ends_a_turn_that_is_being_sampled(tmp_path: Path) -> None:
    engine = Obedient()
    config = gateway_config_of(**{"turntrace.conversation_deadline_s": 2.0})
    with live(tmp_path, engine=engine, config=config) as gateway:
        program = Program.of(gateway)
        assert "(deadline)" in problem("chat", program.say("wait x"))[1]
        assert engine.aborted == engine.asked
        assert program.finish()["turns"] == []


def test_a_prompt_that_is_too_long_is_told_in_words_that_harnesses_know(tmp_path: Path) -> None:
    config = gateway_config_of(prompt_length=50, response_length=50)
    with live(tmp_path, engine=Obedient(), config=config) as gateway:
        program = Program.of(gateway)
        for dialect in DIALECTS:
            answer = program.ask(dialect, body_of(dialect, "long " * 200))
            status, message = problem(dialect, answer)
            assert status == 400
            if dialect == "anthropic":
                assert message.startswith("prompt is too long: ")
                assert message.endswith(" tokens > 100 maximum")
            else:
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                assert "maximum context length is 100 tokens" in message
        assert told("chat", program.say("say on")) == "on"
        assert [one["kind"] for one in program.finish()["warnings"]] == ["refused_requests"]
    assert checked(tmp_path).only.num_turns == 1


def test_the_clients_max_tokens_lowers_ours(gateway: Gateway) -> None:
    program = Program.of(gateway)
    answer = program.say("say one two three four", max_tokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2
    cut = program.ask("anthropic", body_of("anthropic", "say one two three", max_tokens=1)).json()
    assert cut["stop_reason"] == "max_tokens"
    body = body_of("responses", "say one two three", max_output_tokens=1)
    whole = program.ask("responses", body).json()
    assert (whole["status"], whole["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )


def test_a_turn_that_was_cut_goes_on_behind_an_end_token(tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        program = Program.of(gateway)
        messages: list[Any] = [{"role": "user", "content": "cut one two"}]
        first = program.ask("chat", {"messages": messages}).json()["choices"][0]
        assert first["finish_reason"] == "length"
        messages += [first["message"], {"role": "user", "content": "say more"}]
        assert told("chat", program.ask("chat", {"messages": messages})) == "more"
        program.finish()
    record = checked(tmp_path).only
    assert record.branches == []
    assert [kind for kind, _, _ in record.segments][:3] == ["prompt", "sampled", "template"]


# ---------------------------------------------------------------------- the engine, the template


@pytest.mark.parametrize("word", ["down", "nan"])
def test_an_engine_that_fails_is_503_and_the_session_goes_on(word: str, tmp_path: Path) -> None:
    with live(tmp_path, engine=Obedient()) as gateway:
        program = Program.of(gateway, task_id="goes-on")
        for dialect in DIALECTS:
            answer = program.ask(dialect, body_of(dialect, word))
            assert problem(dialect, answer)[0] == 503
            assert int(answer.headers["retry-after"]) > 0
        program.say("say on")
        assert program.finish(reward=1)["reward"] == 1
        failed = Program.of(gateway, task_id="ends-so")
        failed.say(word)
        record = failed.finish(reward=1)
        assert (record["reward"], record["infra_error"]) == (None, True)
        assert record["stop_reason"] == "engine_error"
    assert len(checked(tmp_path).trajectories) == 2


def test_a_template_that_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('not today') }}{% endif %}"
        + tokenizer.chat_template
    )
    with live(tmp_path, engine=Obedient(), template=ChatTemplate(tokenizer)) as gateway:
        program = Program.of(gateway)
        status, message = problem("chat", program.say("refuse"))
        assert (status, "not today" in message) == (400, True)
        assert program.say("say on").status_code == 200
        assert len(program.finish()["warnings"]) == 1


SIGNS = {
    "chat": '{"error":',
    "anthropic": "event: error",
    "responses": "event: response.failed",
}


def test_an_error_within_a_stream_is_the_dialects_event(tmp_path: Path) -> None:
    engine = Obedient()
    with live(tmp_path, engine=engine) as gateway:
        gateway.server.held_s = gateway.server.keep_alive_s = 0.02
        for dialect in DIALECTS:
            engine.gate.clear()
            program = Program.of(gateway)
            body = body_of(dialect, "down wait", stream=True)
            url = f"{gateway.url}{PATHS[dialect]}"
            with httpx.stream("POST", url, json=body, headers=program.headers) as answer:
                assert answer.status_code == 200
                lines = answer.iter_lines()
                first = next(lines)
                assert first.startswith((": keep-alive", "event: ping"))
                engine.gate.set()
                rest = "\n".join(lines)
            assert SIGNS[dialect] in rest


def test_a_slow_answer_is_kept_open_and_whole(tmp_path: Path) -> None:
    engine = Obedient()
    with live(tmp_path, engine=engine) as gateway:
        gateway.server.held_s = gateway.server.keep_alive_s = 0.02
        for dialect in DIALECTS:
            engine.gate.clear()
            program = Program.of(gateway)
            url = f"{gateway.url}{PATHS[dialect]}"
            body = body_of(dialect, "say wait")
            with httpx.stream("POST", url, json=body, headers=program.headers) as answer:
                parts = answer.iter_raw()
                beat = next(parts)
                engine.gate.set()
                rest = b"".join(parts)
            assert beat.strip(b"\n") == b""
            assert told(dialect, beat + rest) == "wait"
            program.finish()
    for record in checked(tmp_path).trajectories.values():
        assert record.num_turns == 1


# ---------------------------------------------------------------------- the disk


def test_a_full_disk_is_503_before_the_answer_leaves(tmp_path: Path) -> None:
    engine = Obedient()
    with live(tmp_path, engine=engine) as gateway:
        program = Program.of(gateway)
        size = (tmp_path / JOURNAL).stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
        try:
            full = program.say("say one")
            new = httpx.post(f"{gateway.url}/sessions", json={})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert problem("chat", full)[0] == new.status_code == 503
        assert (tmp_path / JOURNAL).stat().st_size == size
        asked = engine.asked
        assert told("chat", program.say("say one")) == "one"
        assert engine.asked == asked  # the turn that was sampled is written now, and given
        program.finish()
    assert checked(tmp_path).only.num_turns == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_address_that_cannot_be_had_is_told_before_the_engine_starts(
    tmp_path: Path, host: str
) -> None:
    """An engine in process takes minutes to start."""
    started: list[Obedient] = []

    def start() -> Obedient:
        started.append(Obedient())
        return started[0]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, out = taken.getsockname()[1], tmp_path / "run"
        gateway = Gateway(
            gateway_config_of(), out, host=host, port=port, admin_key="a", engine=start
        )
        with pytest.raises(AgentError, match=f"cannot listen on {host}:{port}: "):
            gateway.start()
    assert (started, out.exists()) == ([], False)
