"""The interpreter of a session: runs calls inside the sandbox, in one `__main__`.

The script is copied into the sandbox, so it imports only the standard library. Its stdin is a
socket: a call is a message with two descriptors, the code and the call's stdin; the answer is the
exit code. The code can only harm its own session: the server accepts nothing but numbers.
"""

from __future__ import annotations

import linecache
import os
import socket
import sys
import traceback
import types
from itertools import count


def main() -> None:
    requests = socket.socket(fileno=os.dup(0))
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = [""]
    process = os.getpid()
    requests.send(b"ready")
    for number in count(1):
        message, fds, _, _ = socket.recv_fds(requests, 16, 2)
        if not message:
            return
        code = _call(module, f"<call {number}>", *fds)
        if os.getpid() != process:  # a fork that reached the code's end is no second interpreter
            os._exit(code)
        requests.send(str(code).encode())


def _call(module: types.ModuleType, name: str, code_fd: int, stdin_fd: int) -> int:
    with open(code_fd, encoding="utf-8") as file:
        source = file.read()
    os.dup2(stdin_fd, 0)
    os.close(stdin_fd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the next call
    linecache.cache[name] = (len(source), None, f"{source}\n".splitlines(keepends=True), name)
    code = _exit_code_of(module, name, source)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = code or 120  # as the interpreter does if it cannot flush
    return code


def _exit_code_of(module: types.ModuleType, name: str, source: str) -> int:
    try:
        exec(compile(source, name, "exec"), vars(module))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        below = error.__traceback__ and error.__traceback__.tb_next  # without this frame
        traceback.print_exception(type(error), error, below)
        return 1
    return 0


if __name__ == "__main__":
    main()
