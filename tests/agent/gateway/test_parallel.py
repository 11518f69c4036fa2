"""Requests of one session at once: an exact budget, and large texts that stop nobody."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.gateway import session as one_session
from agent.gateway.chat import CHAT
from agent.gateway.request import TurnRequest
from agent.loop.budget import TokenBudget
from agent.loop.tasks import Task
from agent.model.base import base_model_dir
from conversations.messages import Message
from conversations.template import ChatTemplate
from conversations.tokens import Piece
from tests.agent.gateway.live import Obedient, checked, gateway_config_of, live
from tests.agent.gateway.program import Program, body_of
from tests.helpers import tokenizer_at


def request(said: str, **more: Any) -> TurnRequest:
    return CHAT.read(json.dumps(body_of("chat", said, **more)).encode())


def test_turns_at_once_never_take_more_than_the_budget_and_all_of_it(tmp_path: Path) -> None:
    config = gateway_config_of(response_length=40)
    with live(tmp_path, engine=Obedient(delay_s=0.01), config=config) as gateway:
        program = Program.of(gateway)
        said = [f"say {number} one two three four five" for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(program.say, said))
        assert program.finish()["stop_reason"] == "length"
    assert {answer.status_code for answer in answers} == {200, 400}
    refused = [answer for answer in answers if answer.status_code == 400]
    assert {one.json()["error"]["code"] for one in refused} == {"budget_exceeded"}
    record = checked(tmp_path).only
    masks = [record.response_mask, *(one.response_mask for one in record.branches)]
    assert sum(map(sum, masks)) == 40


def test_turns_that_fit_together_are_sampled_together(tmp_path: Path) -> None:
    engine = Obedient()

    async def ask() -> int:
        running = gateway.sessions.open(Task("parallel", []))[0]
        asked = [request(f"wait {number}", max_tokens=8) for number in range(4)]
        answering = [await running.begin(one, CHAT, {}) for one in asked]
        late = await running.begin(request("say more", max_tokens=20), CHAT, {})
        await asyncio.sleep(0)
        at_once = engine.asked
        engine.gate.set()
        await asyncio.gather(late.task, *(one.task for one in answering))
        return at_once

    with live(tmp_path, engine=engine, config=gateway_config_of(response_length=40)) as gateway:
        at_once = gateway.session_loop.run(ask())
    assert (at_once, engine.asked) == (4, 5)


async def test_a_turn_that_gives_back_lets_the_next_one_in_and_a_cancelled_one_too() -> None:
    budget = TokenBudget(10)
    rooms = []

    async def turn(used: int, takes_s: float = 0.0) -> None:
        async with budget.reserve(0, 10) as room:
            rooms.append(room)
            await asyncio.sleep(takes_s)
            budget.used += min(used, room)

    cut_off = asyncio.create_task(turn(9, takes_s=60.0))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(turn(4)) for _ in range(4)]
    await asyncio.sleep(0)
    cut_off.cancel()
    await asyncio.gather(cut_off, *waiting, return_exceptions=True)
    assert rooms == [10, 10, 6, 2, 0]
    assert (budget.used, budget.reserved) == (10, 0)


class Watched(ChatTemplate):
    """Notes which thread renders a prompt, in order."""

    def __init__(self) -> None:
        super().__init__(tokenizer_at(base_model_dir()))
        self.rendered: list[tuple[str, str]] = []

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        created: Sequence[Message] = (),
    ) -> list[Piece]:
        pieces = super().prompt(messages, tools, created)
        self.rendered.append((messages[-1]["content"][:9], threading.current_thread().name))
        return pieces


def test_a_large_text_is_encoded_beside_the_loop_and_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_session, "LARGE_TEXT", 1000)
    template, engine = Watched(), Obedient()

    async def ask() -> list[str]:
        running = gateway.sessions.open(Task("large", []))[0]
        asked = ["say large " + "x " * 2000, "say small", "say large " + "x " * 2000]
        begun = await asyncio.gather(*(running.begin(request(one), CHAT, {}) for one in asked))
        turns = await asyncio.gather(*(one.task for one in begun))
        return [turn.served["content"][:5] for turn in turns]

    with live(tmp_path, engine=engine, template=template) as gateway:
        assert gateway.session_loop.run(ask()) == ["large", "small", "large"]
    (first, thread), (second, loop), (third, _) = template.rendered
    assert [first, second, third] == ["say large", "say small", "say large"]
    assert loop == "turntrace-loop"
    assert thread != loop
