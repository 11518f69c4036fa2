"""Servers that sample what a test says, each a process that can be killed: `python -m
tests.agent.native_server`.

Imports once, then forks a server for each port of a line on its stdin and prints its pid; "gone"
for each that ends. It reads the next line once all are gone. Three calls of `look` a conversation,
then a sentence; ids are a function of the prompt alone, with spellings that do not survive decode
and encode.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import zlib
from typing import Any

import uvicorn
from starlette.responses import JSONResponse, Response

from conversations.template import ChatTemplate
from tests.agent.native_api import Server, app
from tests.helpers import ROOT, call, hermes_template, respelled

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


class Native:
    """Servers on the same ports again and again, each a process for us to kill."""

    def __init__(self, *ports: int) -> None:
        command = [sys.executable, "-m", "tests.agent.native_server"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ports = ports
        self.pids: list[int] = []
        self.start()

    def start(self) -> None:
        """Starts all of them; none runs."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, self.ports)) + "\n")
        self.process.stdin.flush()
        self.pids = [int(self._line()) for _ in self.ports]

    def kill(self) -> None:
        """`kill -9` of the first one that runs."""
        os.kill(self.pids.pop(0), signal.SIGKILL)
        assert self._line() == "gone\n"

    def stop(self) -> None:
        """Kills those that run, and ends their parent."""
        while self.pids:
            self.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def main() -> None:
    template = hermes_template()
    for line in sys.stdin:
        children = [fork(template, int(port)) for port in line.split()]
        for child in children:
            print(child, flush=True)
        for _ in children:
            os.wait()
            print("gone", flush=True)


def fork(template: ChatTemplate, port: int) -> int:
    """A server on the port; returns its pid."""
    if child := os.fork():
        return child
    uvicorn.run(app(Server(behaviour(template, DELAY_S))), port=port, log_level="critical")
    os._exit(0)


if __name__ == "__main__":
    main()
