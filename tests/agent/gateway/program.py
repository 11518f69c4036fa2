"""A program of a test: a session, and requests in any dialect by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from agent.gateway import Gateway

PATHS = {
    "chat": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "responses": "/v1/responses",
}
DIALECTS = tuple(PATHS)


def body_of(dialect: str, said: str, /, **more: Any) -> dict[str, Any]:
    """A first request that says `said`."""
    messages = [{"role": "user", "content": said}]
    key = "input" if dialect == "responses" else "messages"
    return {"model": "m", key: messages, **more}


@dataclass(frozen=True)
class Program:
    """A session of a gateway, opened over HTTP."""

    gateway: Gateway
    name: str
    key: str

    @classmethod
    def of(cls, gateway: Gateway, **task: Any) -> Program:
        opened = httpx.post(f"{gateway.url}/sessions", json=task, timeout=60)
        assert opened.status_code == 200, opened.text
        return cls(gateway, opened.json()["id"], opened.json()["api_key"])

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def ask(self, dialect: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(
            f"{self.gateway.url}{PATHS[dialect]}",
            json=body,
            headers={**self.headers, **headers},
            timeout=60,
        )

    def say(self, said: str, /, **more: Any) -> httpx.Response:
        return self.ask("chat", body_of("chat", said, **more))

    def finish(self, **outcome: Any) -> dict[str, Any]:
        url = f"{self.gateway.url}/sessions/{self.name}/finish"
        done = httpx.post(url, json=outcome, timeout=60)
        assert done.status_code == 200, done.text
        record: dict[str, Any] = done.json()
        return record


def told(dialect: str, answer: httpx.Response | bytes) -> str:
    """The text of an answer, or of its body."""
    body = json.loads(answer if isinstance(answer, bytes) else answer.content)
    if dialect == "chat":
        return str(body["choices"][0]["message"]["content"])
    content = body["content"] if dialect == "anthropic" else body["output"][-1]["content"]
    return str(content[0]["text"])


def problem(dialect: str, answer: httpx.Response) -> tuple[int, str]:
    """The status and the message of a refusal, checked for the dialect's form."""
    body = answer.json()
    if dialect == "anthropic":
        assert body["type"] == "error"
        assert isinstance(body["error"]["type"], str)
    else:
        assert {"message", "type", "param", "code"} == set(body["error"])
    return answer.status_code, body["error"]["message"]
