"""An embedded server, a child of this process: started on first use, stopped with its last user.

It cannot outlive this process: it holds the other end of a pipe, and ends when that breaks, `kill
-9` included.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tools.base import SandboxUnavailable, SearchUnavailable, ToolsError

_ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
"""How long a child may take to announce its port: it tries every language first."""
_STOP_S = 5.0


class EmbeddedServer:
    """One child, `python -m MODULE ARGUMENTS`, shared by its users. Thread-safe.

    unavailable: what `url` raises if the child cannot work
    """

    def __init__(
        self, module: str, *arguments: str, unavailable: type[ToolsError] = SandboxUnavailable
    ) -> None:
        self._module = module
        self._arguments = arguments
        self._unavailable = unavailable
        self._lock = threading.Lock()
        self._users = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._url = ""

    def acquire(self) -> None:
        """Counts a user in."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Counts a user out; the last one stops the child."""
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._stop()

    def url(self) -> str:
        """The child's address. Starts it, in half a second, if need be. Raises `unavailable`."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            return self._url

    def check(self) -> None:
        """Raises `unavailable` if the child cannot work on this machine."""
        self.acquire()
        try:
            self.url()
        finally:
            self.release()

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def _start(self) -> None:
        self._stop()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # -P: a `tools` folder in the user's working folder is not ours. A session of its own:
        # Ctrl-C is for this process to handle.
        command = [
            sys.executable,
            "-P",
            "-m",
            self._module,
            "--port",
            "0",
            "--with-parent",
            *self._arguments,
        ]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        first = _first_line(child, self._module)
        if "error" in first:
            _end(child)
            raise self._unavailable(first["error"])
        self._child, self._url = child, f"http://127.0.0.1:{first['port']}"
        atexit.register(self._stop_at_exit, os.getpid())

    def _stop(self) -> None:
        atexit.unregister(self._stop_at_exit)
        child, self._child = self._child, None
        if child is not None:
            _end(child)

    def _stop_at_exit(self, owner: int) -> None:
        if os.getpid() == owner:  # a fork of this process must not stop its parent's child
            self._stop()


def _first_line(child: subprocess.Popen[bytes], module: str) -> dict[str, Any]:
    """The child's announcement: its `port`, or an `error`."""
    if child.stdout is None or not connection.wait([child.stdout.fileno()], START_S):
        return {"error": f"{module} did not start within {START_S:g} s"}
    if not (line := child.stdout.readline()):
        return {"error": f"{module} ended at its start with code {child.wait()}"}
    announced: dict[str, Any] = json.loads(line)
    return announced


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@functools.cache
def sandbox_with(*packages: str) -> EmbeddedServer:
    """The sandbox server whose programs may import these installed packages and no others."""
    return EmbeddedServer(
        "tools.servers.sandbox", *(("--packages", ",".join(packages)) if packages else ())
    )


sandbox = sandbox_with()


@functools.cache
def search_over(index: str) -> EmbeddedServer:
    """The search server of one index, a folder that `search.index.index_of` returned."""
    return EmbeddedServer("tools.servers.search", "--index", index, unavailable=SearchUnavailable)
