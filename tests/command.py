"""The `turntrace` command in a process of its own that starts warm.

`python -m tests.command` imports the packages once; each command is forked from it, so that it has
its own process, files, environment, working folder and exit code, but none of the half second of
imports, and none of the seven seconds that an engine's or a trainer's take. What the start itself
does, and what it may not import, is tested with `python -m agent`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.warm_python import send_request

ROOT = Path(__file__).parent.parent
WARM = (
    "agent.cli",
    "agent.commands.doctor_work",
    "agent.commands.run_work",
    "agent.commands.tools_work",
    "agent.replay.runner",
    "agent.scoring.work",
    "conversations.export.formats",
    "conversations.imports.job",
    "conversations.page.build",
    "conversations.verify",
    "httpx",
    "jsonschema_rs",
    "tokenizers",
    "tools.mcp.tool",
    "tools.search",
    "tools.sandbox",
)
"""What commands import, and MCP servers with the SDK: none of these starts a thread."""
ENGINE = (*WARM, "agent.engines.rollout")
"""For commands that start an engine in process. No thread here but OpenBLAS's, which knows forks.
"""
TRAINER = (
    "agent.engines.rollout",
    "tests.agent.trainer_peer",
    "verl.trainer.ppo.ray_trainer",
    "verl.utils.dataset.rl_dataset",
    "verl.workers.reward_manager.naive",
)
"""For what stands in a verl 0.6.1 trainer's place. One thread more, jemalloc's, which knows forks.
"""
HAS_GPU = Path("/dev/nvidiactl").exists()
"""CUDA survives no fork: then what imports torch starts cold."""


def turntrace(
    *arguments: object,
    cwd: Path = ROOT,
    timeout: float = 120,
    imports: tuple[str, ...] = WARM,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the command. `variables` are set beside this process's environment variables."""
    return run_warm("agent", *arguments, cwd=cwd, timeout=timeout, imports=imports, **variables)


def run_warm(
    module: str,
    *arguments: object,
    cwd: Path = ROOT,
    timeout: float = 120,
    imports: tuple[str, ...],
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE` in a process in which `imports` are imported already.

    Each `PYTHONPATH` has a warm process of its own: what cannot be imported there cannot be here.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    argv = [*map(str, arguments)]
    if HAS_GPU and imports != WARM:
        command = [sys.executable, "-m", module, *argv]
        given: dict[str, Any] = {"cwd": cwd, "env": environment, "timeout": timeout}
        return subprocess.run(command, **given, capture_output=True, text=True, check=False)
    request = {"module": module, "argv": argv, "cwd": str(cwd), "env": environment}
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        Path(os.devnull).open("rb") as nothing,
        socket.socket(socket.AF_UNIX) as line,
    ):
        line.connect(warm_address(environment["PYTHONPATH"], imports))
        send_request(line, request, [file.fileno() for file in (nothing, out, err)])
        with line.makefile("rb") as replies:
            pid = int(replies.readline())
            line.settimeout(timeout)
            try:
                code = int(replies.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise
        written = [_content(file) for file in (out, err)]
    return subprocess.CompletedProcess([module, *argv], code, *written)


def _content(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode()
    return text.replace("\r\n", "\n")


def warm_address(path: str = str(ROOT), imports: tuple[str, ...] = WARM) -> str:
    """The socket of this process's warm process with this `PYTHONPATH` and these imports, which
    ends with it.
    """
    return _started(path, imports)


@functools.cache
def _started(path: str, imports: tuple[str, ...]) -> str:
    folder = tempfile.mkdtemp(prefix="warm-")
    address = f"{folder}/socket"
    command = [sys.executable, "-m", "tests.command", address, *imports]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.stdin.close)
    return address


# ---------------------------------------------------------------------- the warm process


def _next_command(address: str) -> dict[str, Any]:
    """Serves until stdin ends; returns once in each process that is to run a command."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as waiting:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for source in (listener, sys.stdin):
            waiting.register(source, selectors.EVENT_READ)
        while sys.stdin not in [key.fileobj for key, _ in waiting.select()]:
            line, _ = listener.accept()
            with line:
                if os.fork() == 0:
                    return _forked(line)
    Path(address).unlink()
    Path(address).parent.rmdir()
    raise SystemExit


def _forked(line: socket.socket) -> dict[str, Any]:
    """Forks the command, reports its process and its exit code to `line`, and ends; returns in the
    command's process, which is killed if nobody is left at the other end of `line`.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, fds, _, _ = socket.recv_fds(line, 12, 3)
    with line.makefile("rb") as requests:
        request: dict[str, Any] = json.loads(requests.read(int(size)))
    pid = os.fork()
    if pid:
        line.sendall(f"{pid}\n".encode())
        with selectors.DefaultSelector() as waiting:
            child = os.pidfd_open(pid)
            for source in (child, line):
                waiting.register(source, selectors.EVENT_READ)
            if child not in [key.fileobj for key, _ in waiting.select()]:
                os.kill(pid, signal.SIGKILL)  # who asked for it is gone
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    line.close()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    return request


def _become(request: dict[str, Any]) -> None:
    """Makes this process what `python -m MODULE` is at its start, or `python SCRIPT`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script = request.get("script")
    sys.argv = [script or str(ROOT / "agent" / "__main__.py"), *request["argv"]]
    sys.path[0] = request["cwd"]
    random.seed()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if script:
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(request.get("module", "agent"), run_name="__main__", alter_sys=True)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # the command says what is missing, unless it is ours
        if str(error.name).split(".")[0] in ("agent", "conversations", "tools"):
            raise


if __name__ == "__main__":
    gc.disable()
    if "agent.engines.rollout" in sys.argv:
        from agent.engines.start import starting

        with starting():
            _import("agent.engines.rollout")
    for name in sys.argv[2:]:
        _import(name)
    gc.enable()
    gc.collect()
    gc.freeze()  # otherwise each command copies all of this when its end collects it
    _become(_next_command(sys.argv[1]))
