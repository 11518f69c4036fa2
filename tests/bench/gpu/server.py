"""A real SGLang server on the same GPU, through `sglang_server`: the load over HTTP, and a kill and restart under it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from agent.batch import Progress, run_tasks
from agent.engines.sglang_args import environment, start_variables
from agent.engines.sglang_server import SGLangServerEngine
from tests.bench.gpu.load import Load, tasks

START_S = 240.0


class ServerProcess:
    """`python -m sglang.launch_server` in a process group of its own, on a port of its own; it can be started again."""

    def __init__(self, model: Path, arguments: dict[str, Any], log: Path, gpu: int = 0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        given = {"model_path": model, "port": self.port, "skip_tokenizer_init": True, "log_level": "warning", **arguments}
        self._command = [sys.executable, "-m", "sglang.launch_server", *_flags(given)]
        self._log, self._gpu = log, gpu
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; `wait` says when it is up."""
        variables = start_variables(cuda=True) | {"CUDA_VISIBLE_DEVICES": str(self._gpu)}
        with environment(variables), self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> float:
        """Seconds until `/health` answered. Raises RuntimeError where it does not."""
        started = perf_counter()
        while perf_counter() - started < START_S:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200:
                    return perf_counter() - started
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        if value is not False:
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def bare(engine: SGLangServerEngine) -> Any:
    """What the ideal loop awaits over HTTP: the request alone."""

    async def ask(ids: list[int], sampling: dict[str, Any]) -> Any:
        body = {"rid": uuid.uuid4().hex, "input_ids": ids, "sampling_params": sampling, "return_logprob": True, "stream": False}
        return await engine._servers[0].generate(body)

    return ask


async def killed_under_load(server: ServerProcess, load: Load, conversations: int) -> dict[str, Any]:
    """Kills the server while all conversations run, starts it again, and counts how they ended."""
    progress = Progress()
    batch = asyncio.create_task(run_tasks(tasks(conversations), load._runtime(0.05), max_concurrent=conversations, progress=progress))
    while progress.turns_so_far < 3 * conversations // 2:  # noqa: ASYNC110 - in the midst of the second turns
        await asyncio.sleep(0.01)
    at = progress.turns_so_far
    server.kill()
    started = perf_counter()
    server.start()
    await asyncio.to_thread(server.wait)
    up_s = perf_counter() - started
    await batch
    return {
        "conversations": conversations,
        "turns_before_the_kill": at,
        "restart_s": round(up_s, 1),
        "ended": dict(progress.stop_reasons),
        "turns": progress.turns,
        "infra_errors": progress.infra_errors,
    }
