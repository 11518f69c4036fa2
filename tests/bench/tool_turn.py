"""A turn with k concurrent tools: its wall time beside the slowest tool's, as the engine sees it;
also with every limit set.

Measured from the moment the engine has answered with k calls to the moment it is asked for the next
turn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from tests.bench.row import Row
from tests.bench.workload import TOOL_NAME, TOOL_SCHEMA, Workload
from tests.helpers import run_one, runtime
from tools.base import BaseTool, ToolResponse

SLEEP_S = 0.05
BUDGET = 1.05
POLICY: dict[str, Any] = {
    "max_concurrency": 64,
    "rate_limit": 1000,
    "idempotent": True,
    "retries": 3,
    "max_response_tokens": 64,
    "circuit_breaker": {"failures": 5, "cooldown_s": 30},
}
"""Every limit there is, none of which binds."""
CASES: tuple[tuple[int, dict[str, Any]], ...] = ((1, {}), (4, {}), (16, {}), (16, POLICY))
"""How many calls at once, and the tool's config."""


class SleepTool(BaseTool):
    """Sleeps, and notes how long it took."""

    def __init__(self, policy: dict[str, Any]) -> None:
        super().__init__(policy, TOOL_SCHEMA)
        self.took_s: list[float] = []

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, None, dict[str, Any]]:
        started = perf_counter()
        await asyncio.sleep(SLEEP_S)
        self.took_s.append(perf_counter() - started)
        return ToolResponse(parameters["code"]), None, {}


def rows(workload: Workload, *, quick: bool) -> list[Row]:
    """Wall time of the turn / the slowest of its k tools, for each case."""
    return [
        Row(
            "tool_turn_wall_per_slowest",
            [asyncio.run(_ratio(workload, calls, policy)) for _ in range(5 if quick else 15)],
            case=f"calls={calls}{', all limits set' if policy else ''}",
            limit=BUDGET,
            note=f"tools sleep {1e3 * SLEEP_S:.0f} ms",
        )
        for calls, policy in CASES
    ]


async def _ratio(workload: Workload, calls: int, policy: dict[str, Any]) -> float:
    template, tool, seen = workload.template, SleepTool(policy), list[float]()
    blocks = [_call(index) for index in range(calls)]
    turns = iter(["\n".join(blocks), "Done."])

    def respond(prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        asked = perf_counter()
        ids = [*template.encode(next(turns)), template.end_id]
        generation = Generation(ids, [-1.0] * len(ids), "stop")
        seen.extend((asked, perf_counter()))
        return generation

    record = await run_one(
        runtime(template, ScriptedEngine(respond), [tool], shorten=lambda text, **own: None)
    )
    if [call.status for call in record.tool_calls] != ["ok"] * calls or record.num_turns != 2:
        raise RuntimeError(f"the turn did not run its {calls} calls: {record.tool_calls}")
    _, answered, asked_again, _ = seen
    return (asked_again - answered) / max(tool.took_s)


def _call(index: int) -> str:
    call = {"name": TOOL_NAME, "arguments": {"code": f"print({index})"}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
