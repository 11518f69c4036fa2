"""Where a part of the measurement runs: what was asked for, the time that is left, and the figures
so far.

Invariant: each figure is in the file and on the terminal before the next is measured, so that
whatever ends a part costs what was not measured yet, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.config.config import Config, load_config
from agent.engines.engine import Engine
from agent.runs.parts import load_template
from tests.bench.gpu.load import (
    CONVERSATION_TOKENS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TURNS,
    Load,
    Outcome,
    Raw,
)
from tests.bench.gpu.machine import Gpu
from tests.bench.gpu.model import conversations_held, qwen3_shape, tiny_model

MAX_MODEL_LEN = 8192
GPU_SHARE = 0.8
WARM_UP = 64
"""Conversations with which everything is run once, before it counts."""
REPEATED = 256
"""Cases of more conversations run in the first round only: they take long, and long runs vary
little.
"""

Contender = Callable[[int, float], Outcome]
"""A run of so many conversations with tools that take so many seconds."""


class Figures:
    """The figures so far: a line on the terminal for each, the file written anew.

    `began` is when the call did.
    """

    def __init__(self, path: Path, began: float) -> None:
        self.path = path
        self._began = began

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = (
            json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        )
        return found

    def add(self, part: str, case: str, value: Mapping[str, Any]) -> None:
        found = self.read()
        found.setdefault(part, {})[case] = value
        self.path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            f"[{time.time() - self._began:4.0f} s] {part} · {case}: {json.dumps(value)}", flush=True
        )


class Place:
    """`devices` is the number of GPUs, or, where `dry`, of what stands for them.

    `folder` is for scratch.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch

        self.options, self.folder, self.dry = options, folder, bool(options.dry)
        self.cuda: bool = torch.cuda.is_available()
        self.devices: int = torch.cuda.device_count() if self.cuda else 2
        self.gpu = Gpu()
        self.figures = Figures(options.json, options.until - 60 * options.minutes)

    @property
    def left_s(self) -> float:
        """Seconds until `--minutes` are over."""
        left: float = self.options.until - time.time()
        return left

    @functools.cached_property
    def model(self) -> Path:
        """The model under load: Qwen3-0.6B's shape; where dry, a tiny one with weights."""
        return self.tiny if self.dry else self.options.model or qwen3_shape(self.folder / "model")

    @functools.cached_property
    def tiny(self) -> Path:
        return tiny_model(self.folder / "tiny", self.options.model)

    def load(
        self, engine: Engine, raw: Raw, loop: asyncio.AbstractEventLoop, model: Path | None = None
    ) -> Load:
        """The contenders on an engine (of `model`, not the one under load); where dry, of shorter
        turns.
        """
        template = load_template(
            dataclasses.replace(self.config(), model_path=str(model or self.model))
        )
        template.require("tool")
        return Load(engine, raw, template, self.gpu, loop, turn_tokens=64 if self.dry else 128)

    def config(self, conversations: int | None = None, *overrides: str) -> Config:
        """The product's defaults, in the load's sizes: as many conversations at once as
        `conversations`, or as fit.
        """
        seats = conversations or max(self.options.sizes)
        if self.cuda:
            import torch

            memory = torch.cuda.get_device_properties(0).total_memory
            seats = min(
                seats, conversations_held(self.model, GPU_SHARE * memory, CONVERSATION_TOKENS)
            )
        rollout: dict[str, Any] = {
            "prompt_length": PROMPT_LENGTH,
            "response_length": RESPONSE_LENGTH,
            "max_model_len": MAX_MODEL_LEN,
            "load_format": "auto" if self.dry else "dummy",
            "max_num_seqs": seats,
            "gpu_memory_utilization": GPU_SHARE,
            "multi_turn": {"enable": True, "max_assistant_turns": TURNS},
            "engine_kwargs": {"sglang": {"cuda_graph_max_bs": seats}},
        }
        path = self.folder / f"config-{os.getpid()}.yaml"
        path.write_text(json.dumps({"model_path": str(self.model), "rollout": rollout}))
        return load_config(path, [*self.options.overrides, *overrides])

    @contextmanager
    def noting(self, part: str, case: str) -> Iterator[dict[str, Any]]:
        """Adds the figures put into the dict, or the error that ended them."""
        figures: dict[str, Any] = {}
        try:
            yield figures
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            figures["error"] = f"{type(error).__name__}: {said[-1]}"[
                :500
            ]  # the last line: another process' error comes with its traceback
        self.figures.add(part, case, figures)

    def note_machine(self, part: str) -> None:
        """What the part runs on."""
        gpus: list[str] = []
        with suppress(OSError):
            asked = [
                "nvidia-smi",
                "--query-gpu=name,memory.total,driver_version",
                "--format=csv,noheader",
            ]
            gpus = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
        versions = {
            name: importlib.metadata.version(name)
            for name in ("sglang", "verl", "torch", "transformers")
        }
        self.figures.add(
            "machine",
            part,
            {"gpus": gpus, **versions, "set": self.options.overrides, "dry": self.dry},
        )

    def measure(
        self,
        part: str,
        contenders: Mapping[str, Contender],
        sizes: Sequence[int],
        *,
        reset: Callable[[], object],
        once: Sequence[str] = (),
    ) -> None:
        """Each contender in each case, after `reset`; round by round, so that what ends it early
        costs repeats first.

        Before, every contender runs at a small size and the first one at each, which loads and
        compiles (not where dry). Those of `once` run in the first round only. A run that would not
        end in the time that is left is left out, and said so.
        """
        options, longest_s = self.options, dict[int, float]()
        chosen = options.contenders or contenders
        contenders = {name: one for name, one in contenders.items() if name in chosen}

        def run(name: str, size: int, nap_ms: int, round_: int) -> None:
            case, started = (
                f"{size} conversations, {nap_ms} ms, {name}, round {round_}",
                time.perf_counter(),
            )
            if longest_s.get(size, 0.0) > self.left_s:
                print(f"{part} · {case}: left out, {self.left_s:.0f} s are left", flush=True)
                return
            with self.noting(
                part if round_ else "warm-up", f"{part}: {case}" if not round_ else case
            ) as figures:
                reset()
                figures |= contenders[name](size, nap_ms / 1000).figures()
            longest_s[size] = max(longest_s.get(size, 0.0), time.perf_counter() - started)

        for name in contenders if not self.dry else ():
            run(name, min(WARM_UP, *sizes), 0, 0)
        for size in sizes:
            if size > WARM_UP:
                run(next(iter(contenders)), size, 0, 0)
        for round_ in range(1, options.rounds + 1):
            for size in sizes:
                for nap_ms in options.naps if part == "load" else [0]:
                    for name in contenders:
                        if round_ == 1 or (name not in once and size <= REPEATED):
                            run(name, size, nap_ms, round_)
