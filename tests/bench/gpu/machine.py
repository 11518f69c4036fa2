"""What a machine does while something runs on it: the GPU's busy share, memory here and there, CPU of this process."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter, process_time

import psutil

SAMPLE_MS = 100


@dataclass(slots=True)
class Usage:
    """Of one stretch of work: wall and process CPU in seconds, the GPU's busy share in percent where it could be read."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    gpu_busy: float | None = None


@dataclass(slots=True)
class Gpu:
    """`nvidia-smi`'s utilization (the share of the time in which a kernel ran) of the first GPU, read beside the work."""

    process: subprocess.Popen[str] | None = None
    samples: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        query = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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
def measured(gpu: Gpu) -> Iterator[Usage]:
    """The usage of what runs inside, complete at the end."""
    usage = Usage()
    started, cpu = perf_counter(), process_time()
    yield usage
    ended = perf_counter()
    usage.wall_s, usage.cpu_s, usage.gpu_busy = ended - started, process_time() - cpu, gpu.busy(started, ended)


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
