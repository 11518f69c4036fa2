"""SGLang's child processes: started apart from the terminal, watched, their death explained in one
line.

SGLang starts children through `multiprocessing` and expects a failing child to kill its parent; a
child that was killed itself leaves the parent waiting for ever. `Children` stands in for that
module while an engine starts. A child's death is then an `EngineStartError` at start and an
`EngineError` for every request that waits later, and no signal handler of the user's process is
touched.

Children leave the terminal's process group (Ctrl-C is for the parent to handle), do not import the
user's `__main__` again (a script needs no `if __name__ == "__main__"`), and write to a log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from agent.engines import cpu_attention
from agent.errors import EngineError, EngineStartError

T = TypeVar("T")

_ADVICE = (
    (
        r"Not enough memory\. Please try to increase|Memory pool size is too small",
        "rollout.gpu_memory_utilization leaves no room for the KV cache after the weights: "
        "raise it, or rollout.tensor_model_parallel_size",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "CUDA out of memory: lower rollout.gpu_memory_utilization or rollout.max_model_len, "
        "raise rollout.tensor_model_parallel_size, or free the GPU (`nvidia-smi` shows who holds "
        "it)",
    ),
    (
        r"libnvrtc",
        "CUDA's runtime compiler is missing: `pip install nvidia-cuda-nvrtc-cu12` "
        "or put its folder on LD_LIBRARY_PATH",
    ),
    (
        r"Address already in use|EADDRINUSE",
        "a port is taken: stop the other engine, or set SGLANG_PORT to a free one",
    ),
)
_KILLED = (
    "it was killed from outside, most likely because the machine ran out of memory: "
    "free some, or lower max_model_len"
)
_ERROR_LINE = re.compile(r"^\w*(?:\.\w+)*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)


class Children:
    """The processes of one engine, and the sockets that connect it to them.

    `log_path` receives their output; None leaves it with this process's.
    """

    def __init__(self, log_path: Path | None = None) -> None:
        self.log_path = log_path
        self._log_start = log_path.stat().st_size if log_path and log_path.exists() else 0
        self.sockets: list[Any] = []
        self._processes: list[_Child] = []
        self._descendants: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end_reason: str | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    def Process(  # noqa: N802 - multiprocessing's own name
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> SpawnProcess:
        """A process that runs `target` apart from the terminal, for SGLang to start.

        The detokenizer is never started if the engine has no tokenizer: nothing is ever sent to it.
        """
        name = f"{target.__module__}:{target.__qualname__}"
        is_idle = target.__name__ == "run_detokenizer_process" and args[0].skip_tokenizer_init
        kind = _IdleChild if is_idle else _Child
        process = kind(
            target=run_child,
            args=(name, self.log_path, _PauseOfCollector(), *args),
            kwargs=kwargs or {},
        )
        self._processes.append(process)
        return process

    def Pipe(self, duplex: bool = True) -> tuple[Any, Any]:  # noqa: N802 - multiprocessing's own name
        """A pipe whose first end notices if a child dies before it has written."""
        reader, writer = connection.Pipe(duplex)
        return _WatchedReader(reader, self), writer

    def set_start_method(self, *_args: object, **_kwargs: object) -> None:
        """Children are spawned whatever the process default is."""

    def sentinels(self) -> list[int]:
        """A file descriptor for each child, readable once it has ended."""
        return [process.sentinel for process in self._started()]

    def watch_descendants(self) -> None:
        """Watches the processes that children have started: data parallelism's ranks are such.

        Call it once they are all up. Nobody else would notice the death of one. What these start in
        turn, such as a compiler, may end.
        """
        import psutil

        for process in self._started():
            for descendant in psutil.Process(process.pid).children():
                self._descendants.append(os.pidfd_open(descendant.pid))

    def _started(self) -> list[_Child]:
        return [process for process in self._processes if process.pid is not None]

    def wait_for(self, reader: Any) -> None:
        """Returns once `reader` can be read. Raises EngineStartError if a child ends first."""
        if reader not in connection.wait([reader, *self.sentinels()]):
            raise EngineStartError(f"the engine did not start: {self.why_ended()}")

    def why_ended(self) -> str:
        """One line about the child that ended first: why, in plain words, and the log's path."""
        for process in self._started():
            has_ended = process.sentinel in connection.wait(self.sentinels(), timeout=0)
            process.join(timeout=1 if has_ended else 0)
        codes = [process.exitcode for process in self._started() if process.exitcode is not None]
        text = self._printed()
        # A descendant's own code is known to the child alone, which has not ended.
        return explain(text, codes[0] if codes else -signal.SIGKILL) + (
            f" (log: {self.log_path})" if text else ""
        )

    def _printed(self) -> str:
        """The output of these children; an earlier engine's may stand before it in the log."""
        if not self.log_path or not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def watch(self) -> None:
        """Binds the children to the running event loop, which notices their end.

        Raises RuntimeError on another loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            for sentinel in (*self.sentinels(), *self._descendants):
                loop.add_reader(sentinel, lambda: self.end(self.why_ended()))
        if self._loop is not loop:
            raise RuntimeError(
                "an SGLang engine serves one event loop, that of its first generate: "
                "use that one, or start another engine"
            )

    async def answer(self, task: asyncio.Task[T]) -> T:
        """The task's result. Raises EngineError if a child ends first: then no answer can come.

        Cancelling this does not cancel the task.
        """
        self.watch()
        waiter = asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda _: _wake(waiter))
        self._waiting.add(waiter)
        try:
            if self._end_reason is None:
                await waiter
        finally:
            self._waiting.discard(waiter)
        if self._end_reason is not None and (task.cancelled() or not task.done()):
            task.cancel()
            raise EngineError(f"the engine ended: {self._end_reason}")
        return task.result()

    def end(self, reason: str) -> None:
        """Fails every request, now or later, with `reason`; the first reason counts.

        Call it on the engine's loop.
        """
        if self._end_reason is not None:
            return
        self._end_reason = reason
        if self._loop is not None:
            for sentinel in (*self.sentinels(), *self._descendants):
                self._loop.remove_reader(sentinel)
        for waiter in self._waiting:
            _wake(waiter)

    def stop(self) -> None:
        """Kills the children and theirs, waits for them and closes the sockets.

        Safe to call twice.
        """
        import psutil

        for socket in self.sockets:
            socket.close()  # at exit pyzmq would wait for ever for one that is open
        for process in self._started():
            with contextlib.suppress(psutil.NoSuchProcess):
                for descendant in psutil.Process(process.pid).children(recursive=True):
                    descendant.kill()
            process.kill()
        for process in self._started():
            process.join()
        while self._descendants:
            os.close(self._descendants.pop())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Child(SpawnProcess):
    def start(self) -> None:
        with _without_main():
            super().start()


class _IdleChild(_Child):
    def start(self) -> None:
        """Starts nothing."""


class _WatchedReader:
    """The reading end of a pipe; other methods than these are the end's own."""

    def __init__(self, reader: Any, children: Children) -> None:
        self._reader = reader
        self._children = children

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Waits, whatever the time-out: a child's death ends the wait."""
        self._children.wait_for(self._reader)
        return True

    def recv(self) -> Any:
        self._children.wait_for(self._reader)
        try:
            return self._reader.recv()
        except EOFError as error:
            raise EngineStartError(
                f"the engine did not start: {self._children.why_ended()}"
            ) from error


def explain(log: str, exit_code: int | None) -> str:
    """What went wrong and what to do, from a child's output and exit code (negative: a signal)."""
    for pattern, advice in _ADVICE:
        if re.search(pattern, log):
            return advice
    if exit_code == -signal.SIGKILL:
        return _KILLED
    errors = _ERROR_LINE.findall(log)
    return errors[-1].strip() if errors else f"its process ended with exit code {exit_code}"


class _PauseOfCollector:
    """An argument of a child: to unpickle it pauses the child's collector, as `collector_paused`.

    The next ones are SGLang's, and import all of it.
    """

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return gc.disable, ()


def run_child(target: str, log_path: Path | None, _paused: None, *args: Any, **kwargs: Any) -> None:
    """The body of every child process: `target` is `module:function`."""
    import psutil

    os.setpgid(0, 0)
    if log_path is not None:
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    # SGLang's children report a failure by SIGQUIT to their parent, which would kill it; ours
    # watches them instead.
    send = psutil.Process.send_signal

    def send_unless_quit(process: psutil.Process, sig: int) -> None:
        if sig != signal.SIGQUIT:
            send(process, sig)

    psutil.Process.send_signal = send_unless_quit  # type: ignore[method-assign, assignment]
    module, name = target.split(":")
    body = getattr(importlib.import_module(module), name)
    if args and getattr(args[0], "attention_backend", None) == cpu_attention.BACKEND:
        cpu_attention.use_grouped_attention()
    gc.freeze()  # modules stay: no collection walks them
    gc.enable()
    body(*args, **kwargs)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """For imports of thousands of modules: Python's collector would spend a fifth of their CPU.

    It walks all that is there again and again, and modules are no garbage. Afterwards they count as
    old, so that only a full collection walks them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else the user's frozen objects would be thawed
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hides `__main__`, which a spawned child would import again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
