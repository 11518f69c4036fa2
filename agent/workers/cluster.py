"""Ray itself: a local one for one run, or a cluster by address; kept quiet.

Invariant: what a run started is gone when the block is left. Ray sends no usage statistics, serves
no dashboard and prints nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agent.config.config import Config
from agent.config.schema import Rollout
from agent.errors import AgentError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise a warning about its future default
}
OBJECT_STORE_BYTES = 256 << 20
"""Shared memory of a local Ray: records pass through it, they do not stay."""
LISTENS_S = 10.0
"""How long a cluster's head may take to accept a connection."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker takes of the cluster."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} CPU" + (f" and {self.gpus} GPU" if self.gpus else "")


@contextlib.contextmanager
def cluster(config: Config, workers: int, address: str | None) -> Iterator[Share]:
    """Connects to Ray at `address`, or starts one on this machine; gives each worker's share.

    A Ray that this process is connected to already is used, and left as it is. Raises AgentError if
    there is none at the address, or if it has no room for so many workers.
    """
    import ray

    if address is not None and "://" in address:
        raise AgentError(
            f"--ray {address}: give the address of the cluster's head as host:port (or auto), on a "
            "machine that is a node of the cluster; Ray's client (ray://) is not supported"
        )
    if address not in (None, "auto"):
        _check_listens(address)
    if ray.is_initialized():
        yield _share(config, workers)
        return
    with _sigterm_kept(), _environment():
        _connect(config, workers, address)
    try:
        yield _share(config, workers)
    finally:
        ray.shutdown()


def _connect(config: Config, workers: int, address: str | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Its messages about dead workers would stand in the line of progress; Ray's debugger does so.
    ray._private.worker._worker_logs_enabled = False
    if address is None:
        cores = os.cpu_count() or 1
        try:
            ray.init(
                "local",
                num_cpus=cores if config.rollout.name == "sglang" else max(cores, workers),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        except Exception as error:  # Ray has no class of its own for it
            reason = " ".join(str(error).split())[:200]
            raise AgentError(
                f"--workers: Ray did not start on this machine: {reason} (its logs are in "
                "/tmp/ray/session_latest/logs)"
            ) from error
        return
    with _reaching(address):
        ray.init(address, **quiet)


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Makes one line of what goes wrong when a cluster is reached."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AgentError(
            f"--ray {address}: no Ray cluster can be reached there: {reason}; start one with "
            "`ray start --head`, or leave --ray out to start a local one"
        ) from error


def _check_listens(address: str) -> None:
    """Raises AgentError if it is no address, or if nothing listens there that may be Ray.

    Ray itself tries for minutes, and prints what its libraries say.
    """
    host, _, port = address.rpartition(":")
    with _reaching(address):
        if not host or not port.isdecimal():
            raise ValueError("it is not of the form host:port")
        with socket.create_connection((host.strip("[]"), int(port)), LISTENS_S) as connection:
            if not _uses_tls() and not _speaks_http2(connection):
                raise OSError(
                    "what listens there is not Ray (its port is 6379 unless you chose it)"
                )


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side answers as HTTP/2 does, which Ray's head speaks: by SETTINGS first."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    try:
        with connection.makefile("rb") as answer:
            frame = answer.read(9)
    except OSError:  # it hangs up, or says nothing
        return False
    return len(frame) == 9 and frame[3] == 4


def _share(config: Config, workers: int) -> Share:
    """What one worker takes. Raises AgentError if Ray has not so much for all of them."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    each, what = Share(1, 0), "takes"
    if config.rollout.name == "sglang":
        what = "starts an engine of its own, which takes"
        if gpus:
            each = Share(1, _gpus_of_an_engine(config.rollout))
        else:  # an engine computes with all the cores of its share
            each = Share(max(1, min(cpus // workers, os.cpu_count() or 1)), 0)
    fit = min(cpus // each.cpus, gpus // each.gpus if each.gpus else workers)
    if fit < workers:
        raise AgentError(
            f"--workers {workers}: each worker {what} {each}; Ray has {cpus} CPU and {gpus} GPU, "
            + (f"so use --workers {fit}" if fit else "so there is no room for one")
        )
    return each


def _gpus_of_an_engine(rollout: Rollout) -> int:
    tensor, pipeline = rollout.tensor_model_parallel_size, rollout.pipeline_model_parallel_size
    return tensor * pipeline * rollout.data_parallel_size


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets `QUIET` where the user has said nothing; Ray's processes inherit it."""
    fresh = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            del os.environ[name]


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's `init` sets a handler of its own, with which the process would exit at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
