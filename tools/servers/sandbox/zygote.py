"""The warm interpreter: inside bubblewrap it forks for each program instead of starting Python.

The script is copied into the sandbox, so it imports only the standard library.

    zygote      never reads a request: it takes descriptors from the server, forks, closes them
    └── init        process 1 of the program's own namespaces: pid, mount (a new /tmp, /dev/shm and
        │           /proc), ipc, network, cgroup. It tells the server how the program ended; no
        │           program can reach it, because it belongs to another user namespace
        └── program     nobody without rights in a user namespace of its own, limited and filtered;
                        then the code runs

If init ends, by SIGKILL from the server or by itself, the kernel ends every process of the program.
What a program does stays in its own copy of memory; the next one is a fork of the zygote, which has
run no code.
"""

from __future__ import annotations

import atexit
import binascii
import contextlib
import ctypes
import fcntl
import gc
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
import types
from typing import Any, NoReturn

NOBODY = 65534
WORK = "/tmp"

_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWIPC = 0x00020000, 0x02000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
(
    _PR_SET_DUMPABLE,
    _PR_CAPBSET_DROP,
    _PR_SET_SECCOMP,
    _PR_SET_NO_NEW_PRIVS,
    _PR_CAP_AMBIENT,
    _PR_CAP_AMBIENT_CLEAR_ALL,
) = 4, 24, 22, 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_MAX_FDS = 16
_HEARD = {signal.SIGCHLD, signal.SIGUSR1}  # by init: a child ended; the server sent an order
_MAX_OPEN = 4096  # more than all programs can have on their way through sockets

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.fopen.restype = ctypes.c_void_p


def main() -> None:
    """Serves until the server closes the channel.

    Arguments: the channel's descriptor, and the settings as JSON.
    """
    channel = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # init tells the server how it ends
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN, _MAX_OPEN))
    os.umask(0o022)
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
    gc.collect()
    gc.freeze()  # otherwise a child's first collection copies all of this
    while True:
        roles, fds, _, _ = socket.recv_fds(channel, _MAX_FDS, _MAX_FDS)
        if not roles:
            return
        try:
            _check(_libc.unshare(_CLONE_NEWPID))
            if os.fork() == 0:
                channel.close()
                _init(dict(zip(roles.decode(), fds, strict=True)), settings)
        except OSError:  # no process could start: the server sees the request's socket close
            pass
        finally:
            _check(_libc.setns(own_pids, _CLONE_NEWPID))
            for fd in fds:
                os.close(fd)


# ---------------------------------------------------------------------- init


def _init(fds: dict[str, int], settings: dict[str, Any]) -> NoReturn:
    """`fds` by role.

    c: the socket to the server; s: what to run; i, o, e: the program's stdio; and, if they are
    wanted, m: a memory group to join; f: the file for fetched files
    """
    control = socket.socket(fileno=fds["c"])
    try:
        os.setsid()
        # Its files in /proc are then root's, not those of its user, who the program is as well.
        _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
        # Process 1 gets no signal for which it has no handler.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        socket.send_fds(control, [b"started"], [os.pidfd_open(os.getpid())])
        if "m" in fds:
            os.write(fds["m"], b"0")
        _fresh_world(settings)
        ended = _wait_for(_fork(_program, fds, settings), control)
        _end_all_others()
        if "f" in fds:
            with contextlib.suppress(OSError):  # the program may have left no memory for it
                _wait_for(_fork(_fetch, fds, settings), control)
        _tell(control, exit=ended)
    except Exception as error:
        _tell(control, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _tell(control: socket.socket, **facts: Any) -> None:
    control.send(json.dumps(facts).encode())


def _fresh_world(settings: dict[str, Any]) -> None:
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWNET | _CLONE_NEWCGROUP))
    for where, size in (
        (WORK, settings["scratch_bytes"]),
        ("/dev/shm", settings["shared_memory_bytes"]),
    ):
        _mount(
            "tmpfs",
            where,
            _MS_NOSUID | _MS_NODEV,
            f"size={size},nr_inodes={settings['max_files']},mode=1777",
        )
    _mount("proc", "/proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _fork(body: Any, fds: dict[str, int], settings: dict[str, Any]) -> int:
    """A child that runs `body` and then ends."""
    child = os.fork()
    if child == 0:
        try:
            body(fds, settings)
        finally:
            os._exit(1)  # whatever it raised, it must not continue as a second init
    return child


def _wait_for(child: int, control: socket.socket) -> int:
    """The child's exit code, as a shell gives it. Obeys the server's orders meanwhile.

    Orphans of the program are children of init, and are reaped on the way. One thing is done after
    the other: in signal handlers, an older order could be carried out after a newer one.
    """
    while True:
        if signal.sigwait(_HEARD) == signal.SIGUSR1:
            _obey(control)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else 128 - code


def _obey(control: socket.socket) -> None:
    """Stops or continues all others, as the server's last message says."""
    order = b""
    with contextlib.suppress(BlockingIOError):
        while message := control.recv(_MAX_FDS, socket.MSG_DONTWAIT):
            order = message
    if order:
        _signal_all_others(signal.SIGSTOP if order == b"pause" else signal.SIGCONT)


def _end_all_others() -> None:
    _signal_all_others(signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _signal_all_others(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)


def _fetch(fds: dict[str, int], settings: dict[str, Any]) -> None:
    """Writes the fetched files. The program is dead, so only this process can write there.

    It has the program's rights, so that the program's links lead nowhere else.
    """
    request = _read_request(fds["s"])
    _enter_user_namespace()
    _give_up_rights(settings["filter"])
    os.chdir(WORK)
    found = {
        name: content
        for name in request["fetch"]
        if (content := _content(name, settings["max_fetch_bytes"])) is not None
    }
    with open(fds["f"], "w") as file:
        json.dump(
            {
                name: binascii.b2a_base64(content, newline=False).decode()
                for name, content in found.items()
            },
            file,
        )
    os._exit(0)


def _content(name: str, most: int) -> bytes | None:
    """The content of a regular file that is not too large; a pipe does not block."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return (
                file.read()
                if os.fstat(file.fileno()).st_size <= most and os.path.isfile(name)
                else None
            )
    except OSError:
        return None


# ---------------------------------------------------------------------- the program


def _program(fds: dict[str, int], settings: dict[str, Any]) -> None:
    control = socket.socket(fileno=fds["c"])
    try:
        program = _shut_in(fds, settings)
    except Exception as error:
        _tell(control, error=f"{type(error).__name__}: {error}")
        return
    control.close()
    if program[0] == sys.executable:
        _run_python(program[1:])
    _run_command(program)


def _shut_in(fds: dict[str, int], settings: dict[str, Any]) -> list[str]:
    """Becomes the isolated program, with init's control socket. Returns the command."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    _enter_user_namespace()
    request = _read_request(fds["s"])
    for fd, role in enumerate("ioe"):
        os.dup2(fds[role], fd)
    os.closerange(3, fds["c"])
    os.closerange(fds["c"] + 1, _MAX_OPEN)
    os.chdir(WORK)
    for path, content in request["files"].items():
        _write_file(path, binascii.a2b_base64(content))
        # The program's own json.py, for example, comes before the standard one.
        sys.modules.pop(path.split("/")[0].removesuffix(".py"), None)
    _limit(request["limits"])
    _give_up_rights(settings["filter"])
    return list(request["program"])


def _read_request(fd: int) -> Any:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        return json.load(file)


def _write_file(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o755)


def _enter_user_namespace() -> None:
    """Enters one that owns nothing, and in which no other can be made."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))
    _check(_libc.unshare(_CLONE_NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {NOBODY} 1"),
        ("gid_map", f"{NOBODY} {NOBODY} 1"),
    ):
        _write(f"/proc/self/{name}", text)
    _write("/proc/sys/user/max_user_namespaces", "0")
    _write("/proc/self/oom_score_adj", "1000")  # if memory runs out, init never dies first


def _limit(limits: dict[str, int]) -> None:
    """`limits` by the name of the resource, without RLIMIT_."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _give_up_rights(filter_base64: str) -> None:
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _check(_libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    instructions = ctypes.create_string_buffer(binascii.a2b_base64(filter_base64))
    program = struct.pack("H6xQ", (len(instructions) - 1) // 8, ctypes.addressof(instructions))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0))


def _run_command(program: list[str]) -> NoReturn:
    # Python ignores these, and a new program would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execv(program[0], program)


def _run_python(arguments: list[str]) -> NoReturn:
    """Runs a script as the interpreter's command line does, with its tracebacks and exit codes."""
    _become_main(arguments)
    path = arguments[0].encode()
    failed = ctypes.pythonapi.PyRun_SimpleFileExFlags(
        ctypes.c_void_p(_libc.fopen(path, b"r")), path, 1, None
    )
    _end_python(1 if failed else 0)


def _become_main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = arguments
    sys.orig_argv[:] = [sys.executable, *arguments]
    sys.path[0] = WORK
    sys.modules["__main__"] = types.ModuleType("__main__")


def _end_python(code: int) -> NoReturn:
    """Does what the interpreter does at its end, in its order, for the program's own modules.

    It waits for threads, calls exit handlers, frees the program's objects (`__del__` runs) and
    flushes files. Freeing the zygote's modules as well would copy its memory page by page, which
    costs as much as all the rest.
    """
    try:
        if threading := sys.modules.get("threading"):
            threading._shutdown()
        atexit._run_exitfuncs()
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
        for name, module in list(sys.modules.items()):
            if name == "__main__" or (getattr(module, "__file__", None) or "").startswith(WORK):
                del sys.modules[name]
        del module
        _flush_all()
        gc.collect()
        _flush_all()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _flush_all() -> None:
    """Flushes every file of the program. The collector may close a buffer before its text layer."""
    for thing in gc.get_objects():
        if isinstance(thing, io.IOBase):
            with contextlib.suppress(OSError, ValueError):
                thing.flush()


# ---------------------------------------------------------------------- the kernel


def _mount(kind: str, where: str, flags: int, options: str | None) -> None:
    data = options.encode() if options else None
    _check(_libc.mount(kind.encode(), where.encode(), kind.encode(), ctypes.c_ulong(flags), data))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    main()
