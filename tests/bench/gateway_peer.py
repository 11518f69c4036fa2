"""CPU of a coding agent's turn through a whole gateway, ours beside AWS's, in one run.

    python -m tests.bench.gateway_peer [--sessions 4] [--rounds 3] [--quick]

The peer is `agentcore-rl-toolkit` 0.2.0 in an environment of its own (agentcore.txt), in its modes
`linear` and `tree`, its default. All speak HTTP to the same clients and to the same server, which
answers each request at once with a call of some 340 tokens. A session opens at 50,000 tokens: a
system message, 15 tools and a file; each of 31 turns adds a tool's answer of 9,000 characters. The
texts are Python's own library, Qwen2.5's tokenizer reads them. Counted is the CPU of the gateway's
process, everything that it does included: journal and record too, which the peer has not.

Sessions go in step, so that the CPU of each turn is known: `growth` is what a turn costs more at
100,000 tokens than at 10,000. Nothing is asserted but that each answer is the next call.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from agent.engines.servers import SGLangServerEngine
from conversations.template import ChatTemplate
from tests.agent import overlay
from tests.agent.gateway.live import gateway_config_of, live
from tests.bench.cpu import answer_cpu_s
from tests.helpers import ROOT, npm_tokenizer, tokenizer_at

TURNS = 31
OPENING, ANSWER, CALL = 150_000, 9_000, 1_000
"""Characters of a first prompt's file, of a tool's answer, of a call's code."""
SHORT_OPENING, SHORT_TOOLS = 9_000, 2
TOOLS = 15
PEERS = ("linear", "tree")
REQUIREMENTS = Path(__file__).parent / "agentcore.txt"


# ---------------------------------------------------------------------- the texts


def library() -> str:
    """Some 25 MB of Python: the modules of the standard library, in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if "site-packages" not in file.parts)
    return "".join(file.read_text("utf-8", errors="replace") for file in files)


class Texts:
    """New text each time, until the library is used up and begins again."""

    def __init__(self) -> None:
        self._whole = library()
        self._at = 0

    def take(self, characters: int) -> str:
        if self._at + characters > len(self._whole):
            self._at = 0
        self._at += characters
        return self._whole[self._at - characters : self._at]


def schema(name: str) -> dict[str, Any]:
    """A tool with a long description, as coding agents have them."""
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}}
    function = {"name": name, "description": f"{name}: " + "d" * 3000, "parameters": parameters}
    return {"type": "function", "function": function}


# ---------------------------------------------------------------------- the engine's process


async def serve_engine(tokenizer: str) -> None:
    """A server that speaks SGLang's `/generate`: each answer is another call."""
    template = ChatTemplate(tokenizer_at(Path(tokenizer)))
    texts = Texts()
    answers = []
    for _ in range(200):
        call = json.dumps({"name": "tool_0", "arguments": {"code": texts.take(CALL)}})
        text = f"I look at this.\n<tool_call>\n{call}\n</tool_call>"
        answers.append([*template.encode(text), template.end_id])
    following = itertools.cycle(answers)

    async def generate(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        ids = next(following)
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "stop", "matched": template.end_id},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "output_token_logprobs": [[-0.5123456, token, None] for token in ids],
        }
        answer = orjson.dumps({"output_ids": ids, "meta_info": meta})
        return web.Response(body=answer, content_type="application/json")

    async def report(request: web.Request) -> web.Response:
        return web.json_response({"model_path": "m", "version": "9.9"})

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", generate)
    app.router.add_get("/{path:.*}", report)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.to_thread(answer_cpu_s)


def serve_ours(tokenizer: str, engine_url: str) -> None:
    """Our gateway over that server, until stdin ends."""
    template = ChatTemplate(tokenizer_at(Path(tokenizer)))
    template.use_fast_encoder()
    length = 1 << 18
    config = gateway_config_of(prompt_length=length, response_length=length)
    with (
        tempfile.TemporaryDirectory() as folder,
        live(
            Path(folder) / "run",
            engine=SGLangServerEngine([engine_url]),
            config=config,
            template=template,
            open_to_all=True,
        ) as gateway,
    ):
        print(gateway.url, flush=True)
        answer_cpu_s()


# ---------------------------------------------------------------------- a gateway's process


class Process:
    """A process of this benchmark: `url` is where it listens."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self._line()

    def _line(self) -> str:
        assert self._process.stdout
        if line := self._process.stdout.readline().strip():
            return line
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")

    def cpu_s(self) -> float:
        """The CPU seconds that it used so far."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def rss_mb(self) -> float:
        """Its memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


@contextmanager
def process(*command: str, env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A process that ends with the block."""
    started = Process(command, env or {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        yield started
    finally:
        started.close()


# ---------------------------------------------------------------------- the clients


class Client:
    """An agent with a session of its own, which sends its whole history each turn."""

    def __init__(self, key: str, texts: Texts, opening: int, tools: int) -> None:
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._texts = texts
        self._tools = orjson.dumps([schema(f"tool_{number}") for number in range(tools)])
        self._messages = [
            orjson.dumps({"role": "system", "content": "s" * (opening // 7)}),
            orjson.dumps({"role": "user", "content": texts.take(opening)}),
        ]

    async def turn(self, http: aiohttp.ClientSession, url: str) -> int:
        """Asks for a turn, runs its call; returns the tokens of its prompt."""
        messages = b",".join(self._messages)
        body = b'{"model":"m","messages":[%b],"tools":%b}' % (messages, self._tools)
        address = f"{url}/v1/chat/completions"
        async with http.post(address, data=body, headers=self._headers) as answer:
            found = orjson.loads(await answer.read())
            assert answer.status == 200, found
        message = found["choices"][0]["message"]
        (call,) = message["tool_calls"]
        self._messages.append(orjson.dumps(message))
        result = {
            "role": "tool",
            "tool_call_id": call["id"],
            "content": self._texts.take(ANSWER),
        }
        self._messages.append(orjson.dumps(result))
        return int(found["usage"]["prompt_tokens"])


async def costs(gateway: Process, clients: Sequence[Client], turns: int) -> list[tuple[int, float]]:
    """Tokens of the prompt and CPU ms of the gateway for each turn, all clients in step."""
    found = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as http:
        for _ in range(turns):
            before = gateway.cpu_s()
            tokens = await asyncio.gather(*(client.turn(http, gateway.url) for client in clients))
            spent = 1e3 * (gateway.cpu_s() - before) / len(clients)
            found.append((round(statistics.mean(tokens)), spent))
    return found


# ---------------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway_peer")
    parser.add_argument("--sessions", type=int, default=4, help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, two sessions")
    parser.add_argument("--engine", metavar="TOKENIZER", help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        asyncio.run(serve_engine(asked.engine))
    elif asked.ours:
        serve_ours(*asked.ours)
    else:
        sessions, rounds = (2, 1) if asked.quick else (asked.sessions, asked.rounds)
        compare(sessions, rounds)


def compare(sessions: int, rounds: int) -> None:
    """Prints a line for each contender, and how they stand to each other."""
    tokenizer = str(npm_tokenizer("qwen2_5"))
    this = "tests.bench.gateway_peer"
    numbers = itertools.count()
    texts = Texts()
    with ExitStack() as stack:
        engine = stack.enter_context(process(this, "--engine", tokenizer))
        names = {"ours": (this, "--ours", tokenizer, engine.url)}
        contenders = {
            "ours": stack.enter_context(process(*names["ours"])),
            **{
                f"AWS {mode}": stack.enter_context(
                    process(
                        "tests.bench.agentcore_peer",
                        *(tokenizer, engine.url, mode),
                        env=overlay.variables(REQUIREMENTS),
                    )
                )
                for mode in PEERS
            },
        }

        def run(gateway: Process, opening: int, tools: int, turns: int) -> list[tuple[int, float]]:
            keys = (f"s{next(numbers)}" for _ in range(sessions))
            clients = [Client(key, texts, opening, tools) for key in keys]
            return asyncio.run(costs(gateway, clients, turns))

        for gateway in contenders.values():  # imports, caches, the first long prompt
            run(gateway, OPENING, TOOLS, 2)
        whole: dict[str, list[float]] = {name: [] for name in contenders}
        ends: dict[str, list[tuple[int, int]]] = {name: [] for name in contenders}
        growth: list[tuple[float, int, int]] = []
        memory = {name: gateway.rss_mb() for name, gateway in contenders.items()}
        for number in range(rounds):
            for name, gateway in contenders.items():
                if name == "AWS tree" and number:
                    continue  # one round of it takes longer than all the others
                each = run(gateway, OPENING, TOOLS, TURNS)
                whole[name].append(statistics.mean(cost for _, cost in each))
                ends[name].append((each[0][0], each[-1][0]))
                if not number:
                    memory[name] = (gateway.rss_mb() - memory[name]) / sessions
            each = run(contenders["ours"], SHORT_OPENING, SHORT_TOOLS, TURNS)
            early = statistics.mean(cost for _, cost in each[1:4])
            late = statistics.mean(cost for _, cost in each[-4:-1])
            growth.append((late - early, each[2][0], each[-3][0]))
    ours = statistics.median(whole["ours"])
    print(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), f"load {os.getloadavg()[0]:.1f},")
    print(f"{sessions} sessions at once, {rounds} rounds of {TURNS} turns; CPU ms a turn:")
    for name, values in whole.items():
        rest = ", ".join(f"{value:.2f}" for value in values)
        print(
            f"{name:12} {statistics.median(values):8.2f}  ({rest})  "
            f"{statistics.median(values) / ours:6.1f} times ours; from {ends[name][0][0]} to "
            f"{ends[name][0][1]} tokens; {memory[name]:.1f} MB a session"
        )
    middle = statistics.median(one for one, _, _ in growth)
    shown = ", ".join(f"{one:.2f}" for one, _, _ in growth)
    print(f"growth of ours from {growth[0][1]} to {growth[0][2]} tokens: {middle:.2f} ms ({shown})")


if __name__ == "__main__":
    main()
