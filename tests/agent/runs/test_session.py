"""The loop thread of a session, and the parts that it starts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config.config import load_config
from agent.errors import ConfigError
from agent.model.base import base_model_dir
from agent.runs.parts import load_template, prepare
from agent.runs.session import Session
from conversations.errors import TemplateError
from tests.helpers import fresh_tokenizer, hermes_template, says
from tools.registry import load_tools


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    overrides = ["rollout.name=scripted", f"rollout.turntrace.recorded={tmp_path}"]
    parts = prepare(load_config(None, overrides), template=hermes_template())
    with Session(parts, start=lambda: says(hermes_template(), "hi")) as session:
        yield session


async def leave() -> None:
    sys.exit(3)


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


def test_an_exit_inside_reaches_the_caller_and_the_loop_goes_on(session: Session) -> None:
    with pytest.raises(SystemExit):
        session.run(leave())
    assert session.run(answer()) == 42


def test_an_exit_in_a_task_beside_others_reaches_the_caller(session: Session) -> None:
    async def several() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(3600))
            group.create_task(leave())

    with pytest.raises(SystemExit):
        session.run(several())
    assert session.run(answer()) == 42


def test_tools_under_a_template_without_tool_turns_are_refused(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'tool' %}{{ raise_exception('none here') }}{% endif %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    config = load_config(None, [f"model_path={tmp_path}"])
    prepare(config)
    with pytest.raises(TemplateError):
        prepare(config, load_tools("gsm8k"))


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="model_path") as caught:
        load_template(load_config(None, [f"model_path={tmp_path}"]))
    assert "\n" not in str(caught.value)
