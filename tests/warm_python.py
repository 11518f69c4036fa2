"""`python warm_python.py ADDRESS SCRIPT ARGUMENTS`: `python SCRIPT ARGUMENTS` without its imports.

The script is forked from the warm process at ADDRESS (tests/command.py), with this process's files,
folder and environment. This process ends as the script ends, and the script ends with this process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any


def send_request(line: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """Asks the warm process for a process with these files as its 0, 1 and 2."""
    text = json.dumps(request).encode()
    socket.send_fds(line, [f"{len(text):>12}".encode()], fds)
    line.sendall(text)


def _main(address: str, script: str, *arguments: str) -> int:
    request = {
        "script": script,
        "argv": arguments,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
    }
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        send_request(line, request, (0, 1, 2))
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # who reads our output shall see the script's end
            os.dup2(nothing, fd)
        with line.makefile("rb") as replies:
            pid = int(replies.readline())
            signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
            return int(replies.readline())


if __name__ == "__main__":
    code = _main(*sys.argv[1:])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
