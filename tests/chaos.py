"""A run in which every tool misbehaves: 1,000 scripted conversations that know what they provoke.

Tools raise, hang, ignore cancellation, answer 10 MB or nonsense; two real HTTP servers answer 500,
hang up, answer half or garbage, and one of them is killed and comes back. Shared by the test, which
compares each ledger line with what was provoked, and by the benchmark, which compares the wall time
with that of an ideal schedule.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from agent.engines.engine import Generation, SamplingParams
from agent.loop.batch import run_tasks
from agent.loop.boundary import GRACE_S
from agent.loop.calls import Dispatcher
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate
from conversations.truncate import cut_to_tokens
from tests.chaos_server import DELAY_S, HUGE_BYTES
from tests.helpers import ROOT, TOOL_ERRORS, Toy, call, logprobs, settings
from tools.base import BackendError, BaseTool, ToolResponse
from tools.toolset import ToolSet

CONVERSATIONS = 1000
AT_ONCE = 100
ENGINE_S = 0.2
NAP_S = 0.3
TIMEOUT_S = 0.5
"""Of the tools that are asked to hang.

All others have so long that no busy machine makes them late.
"""
PATIENCE_S = 60.0

# ---------------------------------------------------------------------- what is provoked


@dataclass(frozen=True, slots=True)
class Turn:
    """Some calls at once: as the model writes them, how each must end (None: as the tool saw it),
    and how long the slowest takes.
    """

    calls: tuple[str, ...]
    statuses: tuple[str | None, ...]
    takes_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of conversation: its turns, an answer after them.

    `share` of a thousand conversations are of it.
    """

    name: str
    share: int
    turns: tuple[Turn, ...]
    tools_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def statuses(self) -> list[str | None]:
        return [status for turn in self.turns for status in turn.statuses]

    @property
    def takes_s(self) -> float:
        """What the conversation takes where nothing ever waits."""
        return ENGINE_S * (len(self.turns) + 1) + sum(turn.takes_s for turn in self.turns)


WHO = "c????"
"""Stands in a call for the id of the conversation that makes it."""

CALM = Turn(
    (call("toy", do="nap", text=str(NAP_S)), call("web", do="ok", who=WHO)), ("ok", "ok"), NAP_S
)

REST = Turn((call("toy", do="nap", text=str(NAP_S)),), ("ok",), NAP_S)


def toy(do: str, status: str, takes_s: float = 0.0, tool: str = "toy") -> Turn:
    """A call beside one that must not notice."""
    return Turn((call(tool, do=do), call("toy", do="say", text="é🙂")), (status, "ok"), takes_s)


def web(do: str, status: str | None, takes_s: float = DELAY_S, tool: str = "web") -> Turn:
    return Turn((call(tool, do=do, who=WHO), call("toy", do="say")), (status, "ok"), takes_s)


BROKEN: dict[str, Any] = {"toy": {}, "web": {}, "weak": {"create_kwargs": {"do": "bug"}}}

KINDS = (
    Kind("calm", 300, (CALM, CALM)),
    *(Kind(f"toy {do}", 10, (toy(do, "tool_error"), REST)) for do in TOOL_ERRORS),
    Kind("toy backend", 20, (toy("backend", "backend_error"), REST)),
    Kind("toy hang", 60, (toy("hang", "timeout", TIMEOUT_S, "stuck"), REST)),
    Kind("toy stubborn", 20, (toy("stubborn", "timeout", TIMEOUT_S + GRACE_S, "stuck"), REST)),
    Kind("toy huge", 5, (Turn((call("huge"), call("toy", do="say")), ("ok", "ok")), REST)),
    Kind("toy odd", 20, (toy("odd_metrics", "ok"), toy("surrogate", "ok"), toy("control", "ok"))),
    Kind("not created", 20, (toy("say", "backend_error", tool="weak"), REST), BROKEN),
    Kind(
        "malformed",
        20,
        (
            Turn(("<tool_call>{oops</tool_call>", call("toy", do="say")), ("malformed", "ok")),
            REST,
        ),
    ),
    Kind(
        "wrong calls",
        20,
        (
            Turn((call("nobody"), call("toy", do=1)), ("unknown_tool", "invalid_arguments")),
            REST,
        ),
    ),
    Kind(
        "too many",
        20,
        (Turn((call("toy", do="say"),) * 6, ("ok",) * 4 + ("rejected",) * 2), REST),
    ),
    Kind("web 500", 40, (web("500", "backend_error"), REST)),
    Kind("web close", 40, (web("close", "backend_error"), REST)),
    Kind("web half", 40, (web("half", "backend_error"), REST)),
    Kind("web garbage", 40, (web("garbage", "backend_error"), REST)),
    Kind("web hang", 40, (web("hang", "timeout", TIMEOUT_S, "stuck_web"), REST)),
    Kind("web huge", 2, (web("huge", "ok"), REST)),
    Kind("patient", 60, (web("ok", "ok", tool="patient"),) * 3),
    Kind("brittle", 60, (web("ok", None, tool="brittle"),) * 3),
    Kind(
        "killer",
        5,
        (web("die", "backend_error", tool="killer"), web("ok", "ok", tool="patient")),
    ),
)  # fmt: skip


def tasks(kinds: Sequence[Kind]) -> list[Task]:
    return [
        Task(
            f"c{index:04}",
            [{"role": "user", "content": f"{index:04} {kind.name}"}],
            tools_kwargs=kind.tools_kwargs,
        )
        for index, kind in enumerate(kinds)
    ]


def chosen(conversations: int = CONVERSATIONS) -> list[Kind]:
    """The kind of each conversation, in an order that is always the same."""
    rng = random.Random(0)
    kinds = [kind for kind in KINDS for _ in range(kind.share)]
    kinds += [KINDS[0]] * (CONVERSATIONS - len(kinds))
    rng.shuffle(kinds)
    return kinds[:conversations]


def ideal_s(kinds: Sequence[Kind], at_once: int = AT_ONCE) -> float:
    """Wall time of the same admission where nothing but engine and tools takes time, and no server
    is down.
    """
    ends = [0.0] * at_once
    for kind in kinds:
        heapq.heapreplace(ends, ends[0] + kind.takes_s)
    return max(ends)


# ---------------------------------------------------------------------- who provokes it


class Scripts:
    """An engine that plays each conversation's turns; the number in its question says whose."""

    def __init__(self, template: ChatTemplate, kinds: Sequence[Kind]) -> None:
        self._template = template
        self._kinds = kinds
        self._start = template.encode("<|im_start|>")[0]

    def describe(self) -> dict[str, Any]:
        return {"name": "scripts"}

    async def generate(
        self, prompt_ids: Any, sampling: SamplingParams, *, request_id: str
    ) -> Generation:
        await asyncio.sleep(ENGINE_S)
        system = prompt_ids.index(self._start)
        user = prompt_ids.index(self._start, system + 1)
        number = self._template.decode(prompt_ids[user + 1 : user + 8]).split("\n")[1][:4]
        kind = self._kinds[int(number)]
        done = (
            prompt_ids.count(self._start) - 3
        ) // 2  # a turn adds the start of its answers and of the next turn
        text = (
            "".join(kind.turns[done].calls).replace(WHO, f"c{number}")
            if done < len(kind.turns)
            else "42"
        )
        ids = [*self._template.encode(text), self._template.end_id]
        return Generation(ids, logprobs(ids), "stop")

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


class WebTool(BaseTool):
    """Asks a server to misbehave.

    `seen` is what became of each conversation's attempts, by the tool's own account.
    """

    def __init__(self, name: str, port: int, **policy: Any) -> None:
        parameters = {
            "type": "object",
            "properties": {"do": {"type": "string"}, "who": {"type": "string"}},
        }
        super().__init__(
            {"timeout_s": PATIENCE_S, **policy},
            {"type": "function", "function": {"name": name, "parameters": parameters}},
        )
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=16)
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=None,
            limits=limits,
            verify=False,
            trust_env=False,
        )
        self.seen: dict[str, list[str]] = {}

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        seen = self.seen.setdefault(parameters["who"], [])
        seen.append("timeout")
        try:
            answer = await self._client.post("/", json=parameters)
            text = answer.raise_for_status().json()["text"]
        except (httpx.HTTPError, ValueError) as error:
            seen[-1] = "backend_error"
            raise BackendError(f"the server: {type(error).__name__}") from error
        seen[-1] = "ok"
        return ToolResponse(text), None, {}

    async def close(self) -> None:
        await self._client.aclose()


class HugeTool(BaseTool):
    """Answers 10 MB."""

    def __init__(self) -> None:
        super().__init__(
            {}, {"type": "function", "function": {"name": "huge", "parameters": {"type": "object"}}}
        )

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse("x" * HUGE_BYTES), None, {}


class Server:
    """A chaos server as a process; `revive` starts it again on its port after each death, once
    `down` says that was noticed.
    """

    def __init__(self) -> None:
        self.port = 0
        self.deaths = 0

    async def start(self) -> None:
        while True:  # the port may be somebody else's for a moment
            command = (sys.executable, str(ROOT / "tests" / "chaos_server.py"), str(self.port))
            self._process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE
            )
            assert self._process.stdout
            if line := await self._process.stdout.readline():
                self.port = int(line)
                return
            await self._process.wait()

    async def revive(self, noticed: Any) -> None:
        while True:
            await self._process.wait()
            self.deaths += 1
            await noticed()
            await self.start()

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


# ---------------------------------------------------------------------- the run


@dataclass(slots=True)
class Chaos:
    """What a run left behind, beside its folder."""

    kinds: list[Kind]
    tools: dict[str, Any]
    deaths: int
    wall_s: float

    @property
    def ideal_s(self) -> float:
        return ideal_s(self.kinds)

    @property
    def serial_s(self) -> float:
        return sum(kind.takes_s for kind in self.kinds)


async def run(template: ChatTemplate, folder: Path, conversations: int = CONVERSATIONS) -> Chaos:
    """Runs it into a new run folder."""
    kinds = chosen(conversations)
    steady, mortal = Server(), Server()
    await asyncio.gather(steady.start(), mortal.start())
    tools = _tools(steady.port, mortal.port)
    toolset = ToolSet.from_tools(tools.values())
    reviving = asyncio.create_task(mortal.revive(lambda: _noticed(tools["patient"])))
    try:
        dispatcher = Dispatcher(
            toolset,
            max_parallel_calls=4,
            shorten=lambda text, **own: cut_to_tokens(text, 256, "middle", template),
        )
        runtime = Runtime(Scripts(template, kinds), template, settings(max_turns=8), dispatcher)
        started = perf_counter()
        with RunFolder.create(folder, {}) as store:
            await run_tasks(tasks(kinds), runtime, max_concurrent=AT_ONCE, store=store)
        return Chaos(kinds, tools, mortal.deaths, perf_counter() - started)
    finally:
        tools["stuck"].stuck.set()
        reviving.cancel()
        await asyncio.wait([reviving])
        await toolset.close()
        await asyncio.gather(steady.stop(), mortal.stop())


def _tools(steady: int, mortal: int) -> dict[str, Any]:
    """The gates of those that have one are wide: they cost their time and never bind."""
    made = [
        Toy(timeout_s=PATIENCE_S, calc_reward="reward", max_concurrency=10 * AT_ONCE),
        Toy("stuck", timeout_s=TIMEOUT_S),
        Toy("weak"),
        HugeTool(),
        WebTool(
            "web",
            steady,
            rate_limit=10_000,
            max_concurrency=10 * AT_ONCE,
            circuit_breaker={"failures": 10_000},
        ),
        WebTool("stuck_web", steady, timeout_s=TIMEOUT_S),
        WebTool("patient", mortal, idempotent=True, retries=8),
        WebTool("brittle", mortal, circuit_breaker={"failures": 3, "cooldown_s": 0.2}),
        WebTool("killer", mortal),
    ]
    return {tool.name: tool for tool in made}


async def _noticed(patient: WebTool) -> None:
    """The server stays down until a call that is tried again has found it so: the killer's own next
    call will.
    """
    before = _failures(patient)
    while _failures(patient) == before:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.01)


def _failures(tool: WebTool) -> int:
    return sum(attempts.count("backend_error") for attempts in tool.seen.values())
