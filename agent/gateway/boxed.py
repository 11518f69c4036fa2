"""Runs an agent program isolated: it reaches the gateway, and no other address.

The isolation is the sandbox server's, by bubblewrap: no network but a loopback of its own, no host
process, no host file except system libraries, the interpreter and what is mounted read-only: the
program's own installation, and what the user names. Its folder is the only place that it can write
to and that outlives it. Inside, `relay.py` carries connections from the gateway's own port there to
the gateway's unix socket.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent.errors import AgentError
from agent.gateway.box import BOX
from agent.gateway.gateway import Gateway
from tools.servers.sandbox.isolation import NOBODY


def boxed_command(
    gateway: Gateway,
    mounts: Sequence[Path],
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """The command that runs `argv` in `folder` isolated, and its environment.

    Call `gateway.listen_on_socket` before. Raises AgentError if a mount is not there.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise AgentError(f"--agent: there is no program {argv[0]!r} on PATH")
    home = installation(Path(program))
    shown = [home, *links(home / "bin" / "python"), *links(Path(program))]
    shown += [mount.resolve() for mount in mounts]
    for path in shown:
        if not path.exists():
            raise AgentError(f"--agent-mount {path}: is not there")
    _give_to_nobody(folder)
    box = {
        "mounts": [str(path) for path in outermost(shown)],
        "socket": str(gateway.socket),
        "port": int(gateway.url.rpartition(":")[2]),
        "folder": str(folder),
        "environment": dict(environment),
    }
    # Keys stand in an environment, which only this user can read, not in a command.
    outside = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    root = str(Path(__file__).resolve().parents[2])
    given = {**outside, "PYTHONPATH": root, BOX: json.dumps(box)}
    return [sys.executable, "-m", "agent.gateway.box", program, *argv[1:]], given


def outermost(paths: Sequence[Path]) -> list[Path]:
    """The paths without repeats and without those that lie in another one."""
    return [one for one in dict.fromkeys(paths) if not set(one.parents) & set(paths)]


def links(path: Path) -> list[Path]:
    """What a path links to, step by step: each of them must be there inside."""
    found: list[Path] = []
    while path.is_symlink() and len(found) < 40:
        path = Path(os.path.normpath(path.parent / path.readlink()))
        found.append(path)
    return found


def _give_to_nobody(folder: Path) -> None:
    """Root starts programs as nobody, who has to reach the folder and to write into it."""
    if os.geteuid() == 0:
        folder.parent.chmod(0o711)
        os.chown(folder, NOBODY, NOBODY)


def installation(program: Path) -> Path:
    """The folder that a program needs: its virtual environment, its Node packages, or itself."""
    for start in (program, program.resolve()):
        for folder in start.parents:
            if (folder / "pyvenv.cfg").is_file():
                return folder
    found = program.resolve()
    outer = [folder for folder in found.parents if folder.name == "node_modules"]
    return outer[-1] if outer else found
