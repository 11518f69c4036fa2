"""Part `evidence`: what per-token evidence costs, and whether it holds.

Each conversation is one turn that is really sampled: no scripted turn takes its place, so that the
evidence is of the tokens in the record. The model is a mixture of experts without weights of its
own; where dry, the tiny dense one, which has no experts.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from agent.engines.evidence import EvidenceRequest
from agent.loop.batch import run_tasks
from conversations.checks.evidence import evidence_findings
from conversations.run.open_run import open_run
from conversations.run.store import RunFolder
from tests.bench.gpu.engine import SHARED_MEMORY, in_process
from tests.bench.gpu.load import Load, tasks
from tests.bench.gpu.machine import measured
from tests.bench.gpu.model import MOE, qwen3_shape
from tests.bench.gpu.place import Place

ROUNDS = 2


def evidence(place: Place) -> None:
    asked = {"nothing": EvidenceRequest(), "top 5": EvidenceRequest(top_logprobs=5)}
    model, wanted = place.model, []
    if not place.dry:
        model = qwen3_shape(place.folder / "moe", MOE, place.options.model)
        wanted = ["rollout.engine_kwargs.sglang.enable_return_routed_experts=true"]
        asked["experts"] = EvidenceRequest(routed_experts=True)
    size = min(256, max(place.options.sizes))
    with in_process(place, size, *wanted, model=model) as (_, load):
        _run(load, size, EvidenceRequest())  # it loads and compiles
        for round_ in range(1, ROUNDS + 1):
            for name, request in asked.items():
                with place.noting("evidence", f"{size} turns, {name}, round {round_}") as figures:
                    figures |= _run(load, size, request)


def _run(load: Load, size: int, request: EvidenceRequest) -> dict[str, Any]:
    """Speed, size of the files, and how much of what was asked came and holds."""
    runtime = load.runtime(_OneLength(load), 0.0, max_turns=1)
    asked = request if request.flags() else None
    settings = dataclasses.replace(runtime.settings, evidence=asked)
    runtime = dataclasses.replace(runtime, settings=settings)
    folder = SHARED_MEMORY / f"turntrace-evidence-{os.getpid()}"
    try:
        with (
            RunFolder.create(folder, {}) as store,
            measured(load.gpu, load.requests, load.loop) as usage,
        ):
            running = run_tasks(tasks(size), runtime, max_concurrent=size, store=store)
            load.loop.run_until_complete(running)
        return {
            "tokens_per_s": round(size * load.turn_tokens / usage.wall_s),
            "loop_ms_per_turn": round(1e3 * usage.loop_cpu_s / size, 2),
            **_held(folder),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _OneLength:
    """The engine, each turn as long as the load's."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.describe, self.abort = load.engine.describe, load.engine.abort

    async def generate(self, prompt_ids: Any, sampling: Any, **more: Any) -> Any:
        with self._load.requests.one():
            return await self._load.engine.generate(prompt_ids, self._load.work, **more)

    async def close(self) -> None:
        """The engine is closed by whoever started it."""


def _held(folder: Path) -> dict[str, Any]:
    records = list(open_run(folder))
    notes = [record.engine["evidence"] for record in records if "evidence" in record.engine]
    files = list((folder / "evidence").glob("*")) if notes else []
    kinds = sorted({kind for note in notes for kind in note["honoured"]})
    findings = [str(one) for record in records for one in evidence_findings(record, folder)]
    return {
        "records": len(records),
        "sampled": sum(sum(record.response_mask) for record in records),
        **{kind: sum(note["honoured"][kind] for note in notes) for kind in kinds},
        "file_kb": round(sum(file.stat().st_size for file in files) / 1e3 / max(1, len(files)), 1),
        "defects": len(findings),
        **({"first_defect": findings[0]} if findings else {}),
    }
