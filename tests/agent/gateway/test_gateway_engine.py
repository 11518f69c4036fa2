"""A real client on the real CPU engine: what the gateway recorded is what the engine samples for
the same prompt without it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from agent.gateway.gateway import gateway_config
from agent.gateway.server import GatewayServer
from agent.gateway.sessions import GatewaySessions, SessionOutcome
from agent.loop.tasks import Task
from agent.runs.manifest import run_manifest, save_tokenizer
from agent.runs.parts import prepare
from conversations.run.store import RunFolder
from tests.agent.gateway.live import checked, gateway_config_of
from tests.agent.gateway.test_clients import HERE
from tests.helpers import child_env, hermes_template

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_the_openai_sdk_on_the_real_engine(sglang_rollout: Any, tmp_path: Path) -> None:
    config = gateway_config(gateway_config_of(prompt_length=512, response_length=512))
    engine = sglang_rollout.engine()
    parts = prepare(config, template=hermes_template())
    runtime = parts.runtime(engine, {"temperature": 0.0}, 24)
    manifest = run_manifest(config, None, limit=None, validate=False, argv=[])
    with RunFolder.create(tmp_path, {**manifest, "n": None, "gateway": True}) as folder:
        save_tokenizer(tmp_path, parts.template.tokenizer)
        sessions = GatewaySessions(runtime, folder)
        server = GatewayServer(sessions, "m")
        await server.start("127.0.0.1", 0)
        opened = {name: sessions.open(Task(name, [])) for name in ("chat", "responses")}
        keys = {name: key for name, (_, key) in opened.items()}
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            HERE / "clients" / "openai_sdk.py",
            env=child_env({}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        given = json.dumps({"url": server.url, "keys": keys}).encode()
        said, _ = await client.communicate(given)
        assert client.returncode == 0
        for session, _ in opened.values():
            await sessions.finish(session, SessionOutcome())
        await server.stop()
        folder.close({})
    texts = json.loads(said.splitlines()[-1])
    for record in checked(tmp_path).trajectories.values():
        first = record.turns[0]
        start, end = first.start - len(record.prompt_ids), first.end - len(record.prompt_ids)
        alone = await engine.generate(
            record.prompt_ids,
            {
                "temperature": 0.0,
                "max_new_tokens": 24,
                "stop_token_ids": runtime.template.stop_token_ids,
            },
            request_id=uuid.uuid4().hex,
        )
        assert record.response_ids[start:end] == alone.token_ids
        assert record.messages[-1]["content"] == texts[record.task_id]
