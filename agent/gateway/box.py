"""Becomes bubblewrap around an agent program: `python -m agent.gateway.box PROGRAM ARGUMENTS`.

A process of its own, because as root it enters a mount namespace of its own. What is shown inside
stands in the environment variable `BOX`, as JSON: see `boxed.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from tools.servers.sandbox.descriptors import sealed_file
from tools.servers.sandbox.isolation import Isolation, isolations, standing_files
from tools.servers.sandbox.languages import python
from tools.servers.sandbox.seccomp import filter_program

BOX = "TURNTRACE_BOX"
WORK_FOLDER, SOCKET = "/tmp/work", "/tmp/.gateway.sock"
RELAY, ENVIRONMENT = "/opt/relay.py", "/opt/environment.json"
NOT_ISOLATED = 125
"""The exit code if there is no isolation; then nothing was run."""


def enter_box(argv: list[str]) -> None:
    """Replaces this process; returns only if there is no bubblewrap."""
    box = json.loads(os.environ.pop(BOX))
    stack = contextlib.ExitStack()  # never closed: the descriptors go to bubblewrap
    for isolation in isolations(paths=box["mounts"]):
        files = {**standing_files(), **_files(box, isolation, argv[0])}
        fds = {path: _inherited(stack, content) for path, content in files.items()}
        options = [
            "--disable-userns",
            *("--seccomp", str(_inherited(stack, filter_program()))),
            *("--bind", box["folder"], WORK_FOLDER, "--bind", box["socket"], SOCKET),
        ]
        program = [python(), RELAY, str(box["port"]), WORK_FOLDER, *argv]
        command = isolation.command(options, fds, program)
        _become(isolation)
        os.execve(command[0], command, {})


def _files(box: dict[str, object], isolation: Isolation, program: str) -> dict[str, bytes]:
    """The relay, and the environment that it gives to the program."""
    given = {**isolation.environment, **dict(box["environment"])}  # type: ignore[call-overload]
    given["PATH"] = f"{os.path.dirname(program)}:{given['PATH']}"
    relay = Path(__file__).with_name("relay.py").read_bytes()
    return {RELAY: relay, ENVIRONMENT: json.dumps(given).encode()}


def _inherited(stack: contextlib.ExitStack, content: bytes) -> int:
    fd = sealed_file(stack, content)
    os.set_inheritable(fd, True)
    return fd


def _become(isolation: Isolation) -> None:
    """The user that starts bubblewrap: a namespace made by root could still read root's files."""
    if identity := isolation.identity:
        os.setgroups([])
        os.setgid(identity["group"])
        os.setuid(identity["user"])


if __name__ == "__main__":
    enter_box(sys.argv[1:])
    print(
        "there is no bubblewrap; pip install 'turntrace[sandbox]', or leave --agent-sandbox out",
        file=sys.stderr,
    )
    sys.exit(NOT_ISOLATED)
