"""A real sandbox server for a test module, and its programs as seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil

from tools.servers.embedded import EmbeddedServer


def running_server(*arguments: str) -> Iterator[EmbeddedServer]:
    """For a fixture to yield from; gone afterwards."""
    server = EmbeddedServer("tools.servers.sandbox", *arguments)
    server.acquire()
    try:
        server.url()
        yield server
    finally:
        server.release()


def process_of(server: EmbeddedServer) -> psutil.Process:
    port = server.url().rsplit(":", 1)[1]
    for child in psutil.Process().children():
        if any(str(connection.laddr.port) == port for connection in child.net_connections("tcp")):
            return child
    raise LookupError(f"no child of ours listens on {port}")


def programs_of(server: EmbeddedServer) -> list[psutil.Process]:
    return programs(process_of(server))


def programs(server: psutil.Process) -> list[psutil.Process]:
    """The server's programs as the machine sees them: the descendants of its zygote.

    Without a zygote: all that the server started.
    """
    family = server.children(recursive=True)
    zygotes = [process for process in family if _is_zygote(process)]
    for zygote in zygotes:
        if zygote.parent() not in zygotes:
            return zygote.children(recursive=True)
    return family


def _is_zygote(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:2] == ["/opt/zygote.py"]
    except psutil.Error:
        return False


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits until the condition is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come true in time")
        time.sleep(0.02)
