"""Runs an agent program for a (task, sample): its environment, folder, limits and what is kept.

    RUN/programs/ID/stdout.txt, stderr.txt    what it printed, each up to `MAX_OUTPUT_BYTES`
    RUN/programs/ID/files/                    files that it left in its folder, capped
    RUN/programs/ID/program.json              command, exit code, times, what was left out

Invariants: the command is a list of words and never goes through a shell, so a task's text is one
argument whatever is in it. A program's processes end with it. Its folder is empty at its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import RawIOBase
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import quote

from agent.errors import AgentError, TaskError
from agent.gateway.box import NOT_ISOLATED
from agent.gateway.gateway import Gateway, ProgramSession
from agent.gateway.keeper import Keeper
from agent.gateway.sessions import Score
from agent.loop.boundary import describe
from agent.loop.tasks import Task
from conversations.encoding import without_lone_surrogates
from conversations.trajectory import Trajectory

PROMPT = "{prompt}"
PROGRAMS, ABOUT = "programs", "program.json"
MAX_OUTPUT_BYTES = 1 << 20
MAX_FILES, MAX_FILES_BYTES = 1000, 16 << 20
MAX_ARGUMENT_BYTES = (128 << 10) - 1
"""What Linux lets one argument have, besides its NUL."""
MOST_NAMED = 100
"""So many files are named that were left out."""
TERM_S = 5.0
"""How long a program has between SIGTERM and SIGKILL."""
TAIL_CHARACTERS = 2000
"""What a record holds of a program's stdout: its end."""
HIDDEN = ("SGLANG_API_KEY", "TURNTRACE_ADMIN_KEY")
"""Keys of ours that no program gets."""

Wrap = Callable[[Sequence[str], Path, Mapping[str, str]], tuple[list[str], dict[str, str]]]
"""From command, folder and environment to those that run it isolated."""


@dataclass(frozen=True, slots=True)
class AgentCommand:
    """A command with `{prompt}` in it. Raises AgentError if it cannot be run."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> AgentCommand:
        """The words of `text`, split as a shell splits them."""
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise AgentError(f"--agent {text!r}: {error}") from error
        if not any(PROMPT in word for word in words):
            raise AgentError(f"--agent {text!r}: has no {PROMPT}, where the task's text goes")
        if shutil.which(words[0]) is None:
            raise AgentError(f"--agent: there is no program {words[0]!r} on PATH")
        return cls(words)

    def argv(self, prompt: str) -> list[str]:
        """The command for a task's text.

        Raises TaskError if it is longer than an argument may be.
        """
        # No argument can hold a NUL or half a character.
        text = without_lone_surrogates(prompt.replace("\0", "\ufffd"))
        argv = [word.replace(PROMPT, text) for word in self.words]
        longest = max(len(os.fsencode(word)) for word in argv)
        if longest > MAX_ARGUMENT_BYTES:
            raise TaskError(
                f"its text makes an argument of {longest} bytes, and a program can be given "
                f"{MAX_ARGUMENT_BYTES}; put it into a file that the program reads"
            )
        return argv


def prompt_of(task: Task) -> str:
    """The text of a task for a program: what its messages say, one after the other.

    Raises TaskError if they hold more than text.
    """
    texts = [message["content"] for message in task.messages if message["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"task {task.id!r} has images; --agent gives programs text alone")
    return "\n\n".join(texts)


@dataclass(slots=True)
class Ended:
    """How a program ended. `exit_code` is None if it did not start; minus a signal's number."""

    exit_code: int | None = None
    error: str | None = None
    timed_out: bool = False
    wall_s: float = 0.0
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProgramRunner:
    """Runs `command` for tasks, each in a session of `gateway`. `score` gives the rewards.

    `deadline_s` is a program's, None: no limit. `wrap` isolates it. `keeper` ends it if this
    process is killed. `named` is the run folder that records name, if it is not the gateway's: then
    `score` gets the gateway's.
    """

    gateway: Gateway
    command: AgentCommand
    score: Score | None = None
    deadline_s: float | None = None
    wrap: Wrap | None = None
    keeper: Keeper | None = None
    named: Path | None = None

    async def run(self, task: Task, sample: int) -> Trajectory:
        """Runs the program for one (task, sample) and returns the record.

        If cancelled, the program is killed and its session kept as unfinished. Raises AgentError
        if the record cannot be written, and TaskError if no program can be given the task.
        """
        prompt = prompt_of(task)
        session = await self.gateway.open(task, sample)
        kept = self.gateway.out / PROGRAMS / folder_name(f"{task.id}-{sample}")
        try:
            try:
                ended = await self._run(session, prompt, kept)
            except OSError as error:  # its folder: this sample's failure, not the run's
                ended = Ended(error=f"the program could not be run: {describe(error)}")
            return await self._finish(session, ended, kept)
        except asyncio.CancelledError:
            await session.abort()
            raise

    async def _finish(self, session: ProgramSession, ended: Ended, kept: Path) -> Trajectory:
        failed = ended.error
        if ended.exit_code == NOT_ISOLATED and self.wrap:
            failed = f"the program was not run: {_tail(kept / 'stderr.txt').strip()}"
        elif failed is None and not session.has_turns and ended.exit_code != 0:
            failed = f"the program ended with exit code {ended.exit_code} and asked for no turn"
        said = {
            "exit_code": ended.exit_code,
            "wall_s": round(ended.wall_s, 3),
            "folder": str((self.named or self.gateway.out) / PROGRAMS / kept.name),
            "stdout": _tail(kept / "stdout.txt"),
        }
        return await session.finish(
            stop_reason="deadline" if ended.timed_out else "stop",
            infra_error=failed is not None,
            error=failed,
            extra=said,
            score=self._score_where_kept(kept),
        )

    def _score_where_kept(self, kept: Path) -> Score | None:
        """`score`, called with a record whose folder is `kept`, where the files are by then."""
        score = self.score
        if score is None or self.named is None:
            return score

        def scored(record: Trajectory) -> Mapping[str, float]:
            said = {**record.extra["session"], "folder": str(kept)}
            return score(replace(record, extra={**record.extra, "session": said}))

        return scored

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[Path]:
        """An empty folder. It goes at the end, and if this process is killed."""
        made = tempfile.TemporaryDirectory(prefix="turntrace-", ignore_cleanup_errors=True)
        with contextlib.ExitStack() as stack:
            if self.keeper:
                self.keeper.made(made.name)
                stack.callback(self.keeper.removed, made.name)
            folder = Path(stack.enter_context(made)) / "work"
            folder.mkdir()
            yield folder

    async def _run(self, session: ProgramSession, prompt: str, kept: Path) -> Ended:
        _emptied(kept)
        with self._own_folder() as folder:
            argv = self.command.argv(prompt)
            environment = {k: v for k, v in session.env().items() if k not in HIDDEN}
            environment["PWD"] = str(folder)
            command, given = argv, environment
            if self.wrap:
                command, given = self.wrap(argv, folder, session.env({}))
            ended = await self._run_in(command, given, folder, kept)
            ended.left_out = await asyncio.to_thread(keep_files, folder, kept / "files")
        about = {"command": list(argv), **asdict(ended)}
        (kept / ABOUT).write_text(about_text(about), encoding="utf-8")
        return ended

    async def _run_in(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, kept: Path
    ) -> Ended:
        started = perf_counter()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return Ended(error=f"the program could not be started: {describe(error)}")
        ended = Ended()
        if self.keeper:
            self.keeper.began(process.pid)
        try:
            async with asyncio.timeout(self.deadline_s):
                await self._drained(process, kept)
        except TimeoutError:
            ended.timed_out = True
        finally:
            await _end(process)
            if self.keeper:
                self.keeper.ended(process.pid)
            # Our ends of the pipes: what the program left behind may keep the others open.
            process._transport.close()  # type: ignore[attr-defined]
        ended.exit_code, ended.wall_s = process.returncode, perf_counter() - started
        return ended

    async def _drained(self, process: asyncio.subprocess.Process, kept: Path) -> None:
        """Waits until the program ends; what it prints is read all the time."""
        assert process.stdout
        assert process.stderr
        with (
            (kept / "stdout.txt").open("wb", buffering=0) as out,
            (kept / "stderr.txt").open("wb", buffering=0) as err,
        ):
            readers = [
                asyncio.create_task(_copy(process.stdout, out)),
                asyncio.create_task(_copy(process.stderr, err)),
            ]
            try:
                await _exited(process)
                # A process that the program left behind may keep the pipe open.
                await asyncio.wait(readers, timeout=1.0)
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)


async def _copy(stream: asyncio.StreamReader, out: RawIOBase) -> None:
    """Reads to the end, whatever can be written: a program whose pipe is full would hang."""
    left = MAX_OUTPUT_BYTES
    while part := await stream.read(1 << 16):
        with contextlib.suppress(OSError):  # a full disk
            out.write(part[:left])
        left = max(0, left - len(part))


async def _exited(process: asyncio.subprocess.Process) -> None:
    """Waits for the program alone: `process.wait` waits until its pipes are closed, too."""
    while process.returncode is None:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the program and all that it started in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(TERM_S):
            await _exited(process)
    except TimeoutError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await _exited(process)


# ---------------------------------------------------------------------- what is kept


def _emptied(folder: Path) -> None:
    """Makes the folder; an attempt that was cut off may have left one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def about_text(about: Mapping[str, Any]) -> str:
    """The text of program.json."""
    return json.dumps(about, indent=2) + "\n"


def folder_name(record_id: str) -> str:
    """A record's id as the name of a folder: no separators, and never too long."""
    name = quote(record_id, safe=" ", errors="surrogatepass")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def keep_files(folder: Path, target: Path) -> list[str]:
    """Copies the plain files of `folder`, up to `MAX_FILES` and `MAX_FILES_BYTES`.

    Returns what was left out, one path each, the first `MOST_NAMED`. Links are never followed.
    """
    left_out: list[str] = []
    files, size = 0, 0
    for file in sorted(_plain_files(folder)):
        name = str(file.relative_to(folder))
        try:
            length = file.lstat().st_size
            if files == MAX_FILES or size + length > MAX_FILES_BYTES:
                left_out.append(name)
                continue
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy, follow_symlinks=False)
        except OSError:
            left_out.append(name)
            continue
        files, size = files + 1, size + length
    return left_out[:MOST_NAMED]


def _plain_files(folder: Path) -> list[Path]:
    found = []
    for root, _, names in os.walk(folder, followlinks=False):
        for name in names:
            path = Path(root) / name
            with contextlib.suppress(OSError):  # a folder that may be listed, and not entered
                if stat.S_ISREG(path.lstat().st_mode):
                    found.append(path)
    return found


def _tail(file: Path) -> str:
    try:
        text = file.read_bytes().decode(errors="replace")
    except OSError:
        return ""
    return text[-TAIL_CHARACTERS:]


def about_programs(command: str, isolated: bool, reward: str | None) -> dict[str, Any]:
    """What run.json says about the programs of a run, and a resumed run must share with it."""
    return {"command": command, "isolated": isolated, "reward": reward}
