"""Servers that sample what a test says, each a process that can be killed: `python -m
tests.agent.native_server`.

Imports once, then forks one server for each port on its stdin and prints the server's pid, and once
it is gone "gone". Three calls of `look` a conversation, then a sentence; ids are a function of the
prompt alone, with spellings that do not survive decode and encode.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import zlib
from typing import Any

import uvicorn
from starlette.responses import JSONResponse, Response

from conversations.template import ChatTemplate
from tests.agent.native_api import Server, app
from tests.helpers import call, hermes_template, respelled

CALLS = 3
DELAY_S = 0.3


def sampled(template: ChatTemplate, prompt_ids: list[int]) -> list[int]:
    """What the model says after `prompt_ids`."""
    text = template.decode(prompt_ids)
    done = text.count("<tool_response>")
    said = f"found {done} times" if done == CALLS else call("look", question=f"{done}?")
    seed = zlib.crc32(repr(prompt_ids).encode())
    return [*respelled(template, said, random.Random(seed)), template.end_id]


def behaviour(template: ChatTemplate, delay_s: float) -> Any:
    async def answer(server: Server, body: dict[str, Any]) -> Response:
        await asyncio.sleep(delay_s)
        ids = sampled(template, body["input_ids"])
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(body["input_ids"]),
        }
        return JSONResponse(
            {
                "output_ids": ids,
                "meta_info": {
                    **meta,
                    "output_token_logprobs": [[-0.5, token, None] for token in ids],
                },
            }
        )

    return answer


def main() -> None:
    template = hermes_template()
    for port in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            os.waitpid(child, 0)
            print("gone", flush=True)
        else:
            uvicorn.run(
                app(Server(behaviour(template, DELAY_S))), port=int(port), log_level="critical"
            )
            os._exit(0)


if __name__ == "__main__":
    main()
