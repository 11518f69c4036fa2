"""One client, one session: a chat program from its first request to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from agent.gateway import Gateway
from tests.agent.gateway.live import checked, hermes_call, live, then
from tests.helpers import LOOK_SCHEMA

PLAN = then(hermes_call("look", {"question": "a  b"}), "It is 42.")


def post(gateway: Gateway, path: str, body: Any, key: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{gateway.url}{path}", json=body, headers=headers, timeout=60)


def test_a_chat_program_ends_in_a_record(tmp_path: Path) -> None:
    with live(tmp_path, PLAN) as gateway:
        opened = post(gateway, "/sessions", {"task_id": "t", "ground_truth": 42}).json()
        messages: list[Any] = [{"role": "user", "content": "What?"}]
        body = {"model": "m", "messages": messages, "tools": [LOOK_SCHEMA]}
        first = post(gateway, "/v1/chat/completions", body, opened["api_key"]).json()
        message = first["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert first["choices"][0]["finish_reason"] == "tool_calls"
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "42"}]
        second = post(gateway, "/v1/chat/completions", body, opened["api_key"]).json()
        assert second["choices"][0]["message"]["content"] == "It is 42."
        done = post(gateway, f"/sessions/{opened['id']}/finish", {"reward": 1.0})
        assert done.status_code == 200
        late = post(gateway, "/v1/chat/completions", body, opened["api_key"])
        assert (late.status_code, late.json()["error"]["code"]) == (400, "session_finished")
    record = checked(tmp_path).only
    assert (record.id, record.reward, record.stop_reason, record.num_turns) == (
        "t-0",
        1.0,
        "stop",
        2,
    )
    assert [call.status for call in record.tool_calls] == ["external"]
    assert record.turns[1].response_id == second["id"]
    assert record.branches == []
