"""AWS's gateway (`agentcore-rl-toolkit`), for `tests.bench.gateway_peer`.

    python -m tests.bench.agentcore_peer TOKENIZER ENGINE_URL linear|tree

Runs in an environment that has the package (`agentcore.txt`). It has no parser for Qwen2.5's calls:
the one below is given to it, as its documentation asks.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

from tests.bench.cpu import answer_cpu_s

END_ID = 151645
"""`<|im_end|>` of Qwen2.5."""


def parse_calls(text: str, tools: list[Any]) -> tuple[str, list[dict[str, Any]], bool]:
    """Text, calls, and whether a call is malformed."""
    calls = []
    for found in re.finditer(r"<tool_call>\s*(.+?)\s*</tool_call>", text, re.DOTALL):
        try:
            call = json.loads(found[1])
            calls.append({"name": call["name"], "input": call["arguments"]})
        except (ValueError, KeyError, TypeError):
            return text, calls, True
    rest = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL)
    return rest.replace("<|im_end|>", "").strip(), calls, False


async def serve(tokenizer_folder: str, engine_url: str, mode: str) -> None:
    """Serves until stdin ends."""
    from agentcore_rl_toolkit.rollout_gateway import HfTemplateRenderer, RolloutGateway
    from agentcore_rl_toolkit.rollout_gateway.sampling_backends.sglang_http import (
        SglangHttpBackend,
    )
    from aiohttp import web
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    gateway = RolloutGateway(
        backend=SglangHttpBackend(engine_url),
        renderer=HfTemplateRenderer(tokenizer, stop_sequences=[END_ID], tool_parser=parse_calls),
        tokenizer=tokenizer,
        history_mode=mode,
    )
    runner = web.AppRunner(gateway.app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.to_thread(answer_cpu_s)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
