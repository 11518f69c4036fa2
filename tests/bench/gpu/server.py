"""Part `server`: the load through `python -m sglang.launch_server`, and the server's death under
it.

The server gets what the in-process engine gets. Its ideal loop is HTTP/1.1 on plain sockets, a
connection for each request in flight: what is between it and the in-process engine is the server's,
what is between it and ours is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from agent.config.installed import sglang_arguments
from agent.engines.arguments import (
    CONTEXT_SLACK,
    server_args,
    start_variables,
    with_default_dtype,
)
from agent.engines.cpu_guards import guard_paths
from agent.engines.servers import SGLangServerEngine
from tests.agent.native_api import free_port
from tests.bench.gpu.load import Load, Raw
from tests.bench.gpu.place import MAX_MODEL_LEN, Contender, Place
from tests.helpers import ROOT

START_S = 240.0
SIZES = (64, 256)


class ServerProcess:
    """`python -m sglang.launch_server` in a process group of its own, on a port of its own; it can
    be started again.
    """

    def __init__(
        self, model: Path, flags: Mapping[str, Any], log: Path, *, cuda: bool, gpu: int = 0
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        given = {
            "model_path": model,
            "port": port,
            "skip_tokenizer_init": True,
            "log_level": "warning",
            **flags,
        }
        self._command = [sys.executable, "-m", "sglang.launch_server", *arguments(given)]
        paths = [str(ROOT), *guard_paths(), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            **os.environ,
            **start_variables(cuda=cuda),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if cuda:
            self._environment["CUDA_VISIBLE_DEVICES"] = _visible(gpu)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; `ready` says when it is up."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> float:
        """Waits until `/health` answers; seconds.

        Raises RuntimeError, with the end of the log, where it does not.
        """
        started = perf_counter()
        while perf_counter() - started < START_S and self._process and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return perf_counter() - started
            time.sleep(0.2)
        raise RuntimeError(
            f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}"
        )

    def kill(self) -> None:
        """`kill -9` of all of it, as a machine that goes away."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _visible(gpu: int) -> str:
    """The `gpu`th of the GPUs that this process sees."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[gpu] if listed else str(gpu)


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """A command line of them; what is None or False is left out."""
    given = {
        f"--{name.replace('_', '-')}": value
        for name, value in flags.items()
        if value is not None and value is not False
    }
    return [
        part
        for flag, value in given.items()
        for part in ([flag] if value is True else [flag, str(value)])
    ]


def server_flags(place: Place, conversations: int) -> dict[str, Any]:
    """What the in-process engine gets for as many conversations at once."""
    config = place.config(conversations)
    rollout = with_default_dtype(config.verl_rollout(), cuda=place.cuda)
    return {
        "load_format": rollout["load_format"],
        "dtype": rollout["dtype"],
        "mem_fraction_static": rollout["gpu_memory_utilization"],
        "max_running_requests": rollout["max_num_seqs"],
        "attention_backend": "fa3",
        **server_args(rollout, cuda=place.cuda),
        "enable_memory_saver": False,
        "log_level": "warning",
    }


def _exact_flags(place: Place, conversations: int) -> dict[str, Any]:
    """A server of the tiny model with kernels of torch's own.

    On a CPU in float32, where greedy tokens do not hang on the batch; SGLang's norms on a GPU know
    no float32, so how many tokens two undisturbed runs differ in stands beside.
    """
    plain = {
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "disable_piecewise_cuda_graph": True,
    }
    own = {key: value for key, value in plain.items() if key in (sglang_arguments() or plain)}
    shape = {
        "context_length": MAX_MODEL_LEN + CONTEXT_SLACK,
        "max_running_requests": conversations,
        "max_total_tokens": 1 << 17,
    }
    backends = {
        "dtype": "bfloat16" if place.cuda else "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
    }
    return {
        **({} if place.cuda else {"device": "cpu", "sleep_on_idle": True}),
        "mem_fraction_static": 0.3,
        **shape,
        **backends,
        **own,
    }


class BareHttp:
    """The ideal loop's client. `close` it."""

    def __init__(self, url: str) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, ids: list[int], sampling: dict[str, Any]) -> Any:
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": ids,
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": False,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        reader, writer = await self._connection()
        writer.write(head.encode() + content)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        length = next(
            int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")
        )
        answer = await reader.readexactly(length)
        if " 200 " not in status:
            raise RuntimeError(f"{status}: {answer[:300]!r}")
        self._free.append((reader, writer))
        return json.loads(answer)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, int(self._port), limit=1 << 20)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


def client(engine: SGLangServerEngine) -> Raw:
    """A bare loop's request through our client: no conversation, no record."""

    async def ask(ids: list[int], sampling: dict[str, Any]) -> Any:
        return {
            "output_ids": (
                await engine.generate(ids, sampling, request_id=uuid.uuid4().hex)
            ).token_ids
        }

    return ask


def contenders(load: Load, engine: SGLangServerEngine) -> dict[str, Contender]:
    return {
        "ideal": load.ideal,
        "client": lambda size, nap_s: load.bare(client(engine), size, nap_s),
        "ours": load.ours,
    }


def empty_caches(servers: Sequence[ServerProcess]) -> None:
    """Raises HTTPError where one does not empty it: it refuses while it still clears up after a
    request.
    """
    for one in servers:
        for _ in range(50):
            answer = httpx.post(f"{one.url}/flush_cache", timeout=30.0)
            if answer.status_code != 400:
                break
            time.sleep(0.1)
        answer.raise_for_status()


@contextlib.contextmanager
def running(servers: Sequence[ServerProcess]) -> Iterator[dict[str, Any]]:
    """All of them, started at once and ended; yields how long that took."""
    try:
        for one in servers:
            one.start()
        yield {"servers": len(servers), "start_s": round(sum(one.ready() for one in servers), 1)}
    finally:
        for one in servers:
            one.kill()


def server(place: Place) -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    _measure(place, loop)
    with place.noting("server", "killed and started again under load") as figures:
        figures |= loop.run_until_complete(_killed(place, loop))


def _measure(place: Place, loop: asyncio.AbstractEventLoop) -> None:
    sizes = place.options.sizes if place.dry else SIZES
    process = ServerProcess(
        place.model,
        server_flags(place, max(sizes)),
        place.options.logs / "server.log",
        cuda=place.cuda,
    )
    with running([process]) as started:
        place.figures.add("server", "start", started)
        bare, engine = (
            BareHttp(process.url),
            SGLangServerEngine([process.url], max_connections=max(sizes)),
        )
        loop.run_until_complete(engine.connect())
        load = place.load(engine, bare.ask, loop)
        place.measure(
            "server", contenders(load, engine), sizes, reset=lambda: empty_caches([process])
        )
        bare.close()
        loop.run_until_complete(engine.close())


async def _killed(place: Place, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Greedy conversations whose server is killed in their midst, beside two runs that nothing
    happens to.
    """
    conversations = min(place.options.sizes) if place.dry else SIZES[0]
    process = ServerProcess(
        place.tiny,
        _exact_flags(place, conversations),
        place.options.logs / "killed.log",
        cuda=place.cuda,
    )

    async def restart() -> None:
        process.kill()
        process.start()
        await asyncio.to_thread(process.ready)

    async def nothing() -> None:
        """What happens to a run that is not disturbed."""

    with running([process]) as started:
        engine = SGLangServerEngine([process.url], max_connections=conversations)
        await engine.connect()
        load = place.load(engine, client(engine), loop, place.tiny)
        greedy = load.scripted(load.turn_tokens // 4, temperature=0.0)
        runs = [
            await load.interrupted(conversations, happens, load.runtime(greedy, 0.05))
            for happens in (nothing, nothing, restart)
        ]
        await engine.close()
    said = [
        {key: one.prompt_ids + one.response_ids for key, one in run.ended.items()} for run in runs
    ]
    return {
        **started,
        **runs[-1].figures,
        "tokens_differ_undisturbed": _differing(said[0], said[1]),
        "tokens_differ_killed": _differing(said[0], said[2]),
    }


def _differing(one: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> int:
    return sum(ids != other.get(key) for key, ids in one.items())
