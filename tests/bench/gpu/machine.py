"""What happens while something runs: requests at the engine, the event loop's lag, CPU, the GPUs'
busy share, memory.

A run's wall time is accounted for from the engine's side: with no request there the GPU has nothing
to do, be it at the start (prompts are rendered), at the end (records are written) or in between
(tools run, the loop is behind).
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time, thread_time

import psutil

SAMPLE_MS = 100
LAG_EVERY_S = 0.005


@dataclass(slots=True)
class Usage:
    """Of one stretch of work, in seconds but for what its name says.

    `loop_cpu_s` is CPU of the event loop's thread, `cpu_s` of the whole process. `head_s` is before
    the first request at the engine, `tail_s` after its last answer, `idle_s` all time without one,
    these two included; `in_flight` is the mean number of requests. `gpu_busy` is percent of the
    time, None where it could not be read.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    loop_cpu_s: float = 0.0
    lag_p50_ms: float = 0.0
    lag_p99_ms: float = 0.0
    head_s: float = 0.0
    tail_s: float = 0.0
    idle_s: float = 0.0
    in_flight: float = 0.0
    writing_s: float = 0.0
    gpu_busy: float | None = None


@dataclass(slots=True)
class Requests:
    """When requests went to the engine and when their answers came."""

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        self.began.append(perf_counter())
        try:
            yield
        finally:
            self.ended.append(perf_counter())


@dataclass(slots=True)
class Gpu:
    """`nvidia-smi`'s utilization (the share of the time in which a kernel ran), mean of the first
    `count` GPUs.
    """

    count: int = 1
    process: subprocess.Popen[str] | None = None
    samples: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        listed = ",".join(map(str, range(self.count)))
        query = [
            "nvidia-smi",
            "-i",
            listed,
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-lms",
            str(SAMPLE_MS),
        ]
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        if self.process and self.process.stdout:
            for line in self.process.stdout:
                with contextlib.suppress(ValueError):
                    self.samples.append((perf_counter(), float(line)))

    def busy(self, start: float, end: float) -> float | None:
        found = [value for at, value in self.samples if start <= at <= end]
        return sum(found) / len(found) if found else None

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()


@contextlib.contextmanager
def measured(gpu: Gpu, requests: Requests, loop: asyncio.AbstractEventLoop) -> Iterator[Usage]:
    """The usage of what runs inside, on `loop` and its thread, complete at the end."""
    usage, lags = Usage(), [0.0]
    requests.began.clear()
    requests.ended.clear()
    watching = loop.create_task(_watch(lags))
    started, cpu, thread = perf_counter(), process_time(), thread_time()
    try:
        yield usage
    finally:
        watching.cancel()
    ended = perf_counter()
    usage.wall_s, usage.cpu_s, usage.loop_cpu_s = (
        ended - started,
        process_time() - cpu,
        thread_time() - thread,
    )
    usage.lag_p50_ms, usage.lag_p99_ms = (1e3 * percentile(lags, share) for share in (0.5, 0.99))
    usage.head_s, usage.tail_s, usage.idle_s, usage.in_flight = flight(
        requests.began, requests.ended, started, ended
    )
    usage.gpu_busy = gpu.busy(started, ended)


async def _watch(lags: list[float]) -> None:
    while True:
        slept = perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        lags.append(perf_counter() - slept - LAG_EVERY_S)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def flight(
    began: Sequence[float], ended: Sequence[float], start: float, end: float
) -> tuple[float, float, float, float]:
    """Of requests within (start, end): `Usage`'s head_s, tail_s, idle_s and in_flight."""
    if not began or not ended:
        return 0.0, 0.0, end - start, 0.0
    idle, since, running = 0.0, start, 0
    for at, step in sorted([*((at, 1) for at in began), *((at, -1) for at in ended)]):
        if not running:
            idle += at - since
        running += step
        since = at
    return (
        min(began) - start,
        end - since,
        idle + end - since,
        (sum(ended) - sum(began)) / (end - start),
    )


def process_mib() -> float:
    """Resident memory of this process and of all its children."""
    here = psutil.Process()
    resident = 0
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            resident += process.memory_info().rss
    return float(resident) / 2**20


def gpu_used_mib() -> float | None:
    """Memory in use on the first GPU, by whomever; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 2**20
