"""Agent programs in a worker (`run --agent`): a gateway of the worker's own, on its loopback.

Records, what programs printed and the files that they left go back to the run's process, which
writes them. So nothing here is on disk but a program's folder while it runs. There is no journal:
the programs of a worker that dies are run again from their start, and its keeper ends them and
removes their folders.
"""

from __future__ import annotations

import functools
import json
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.gateway.boxed import boxed_command
from agent.gateway.gateway import Gateway
from agent.gateway.keeper import Keeper
from agent.gateway.programs import (
    ABOUT,
    MOST_NAMED,
    PROGRAMS,
    AgentCommand,
    ProgramRunner,
    Wrap,
    about_text,
    folder_name,
)
from agent.gateway.server import GatewayServer
from agent.gateway.session import GatewaySession
from agent.gateway.sessions import GatewaySessions, Score
from agent.loop.conversation import SentFiles
from agent.loop.tasks import Task
from agent.runs.session import Session
from conversations.run.hash_store import HashStore
from conversations.run.store import image_store
from conversations.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Programs:
    """What a worker runs: `command` for each task, in a sandbox if `isolated`.

    `out` is the run folder, as records name it. `score` makes the reward function; it is called in
    the worker.
    """

    command: AgentCommand
    out: Path
    score: Callable[[], Score] | None = None
    deadline_s: float | None = None
    isolated: bool = False
    mounts: tuple[Path, ...] = ()


class SentRecords:
    """Stands where a gateway has its run folder: keeps the lines until they are sent."""

    def __init__(self, scratch: Path) -> None:
        self.done: set[tuple[str, int]] = set()
        self.lines: dict[str, str] = {}
        self._scratch = scratch

    def image_store(self) -> HashStore:
        """A store that stays empty: with workers a model that sees images is refused."""
        return image_store(self._scratch)

    def append(self, trajectory: Trajectory) -> str:
        """Raises RecordError if the record has no JSON form."""
        line = self.lines[trajectory.id] = trajectory.to_line()
        return line

    append_unfinished = append

    def append_journal(self, line: bytes) -> None:
        """Nobody goes on with a session of a worker that died."""


class WorkerGateway(Gateway):
    """A gateway in the worker's session, for `programs`. Close it before the session."""

    def __init__(self, session: Session, programs: Programs) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="turntrace-programs-")
        super().__init__(session.parts.config, self._scratch.name, admin_key=secrets.token_hex(16))
        self.session_loop = session
        self._programs = programs
        self._sent = SentRecords(self.out)

    def start(self) -> None:
        """Listens on a free port of the loopback."""
        with ExitStack() as stack:
            stack.callback(self._scratch.cleanup)
            self.sessions = GatewaySessions(self.session_loop.runtime, self._sent, self.progress)
            self.server = GatewayServer(
                self.sessions, Path(self.config.model_path).name, self._access
            )
            self._listen()
            stack.callback(lambda: self.session_loop.run(self._stop()))
            self._stack = stack
            self._runner = self._make_runner(stack)
            self._stack = stack.pop_all()

    def _make_runner(self, stack: ExitStack) -> ProgramRunner:
        programs = self._programs
        wrap: Wrap | None = None
        if programs.isolated:
            self.listen_on_socket()
            wrap = functools.partial(boxed_command, self, programs.mounts)
        score = programs.score() if programs.score else None
        keeper = Keeper()
        stack.callback(keeper.close)
        keeper.made(self._scratch.name)
        if self.socket:
            keeper.made(str(self.socket.parent))
        return ProgramRunner(
            self,
            programs.command,
            score,
            programs.deadline_s,
            wrap,
            keeper=keeper,
            named=programs.out,
        )

    @property
    def live(self) -> list[GatewaySession]:
        """The sessions of the programs that run."""
        return self.sessions.live

    async def run_program(self, task: Task, sample: int) -> None:
        """Runs the program of a (task, sample); `take` gives what came of it, cancelled or not."""
        await self._runner.run(task, sample)

    def take(self, task: Task, sample: int) -> tuple[str | None, SentFiles]:
        """The record's line, None if it was cut off before it began, and the files of the
        program's folder. Both are forgotten here.
        """
        record_id = f"{task.id}-{sample}"
        kept = self.out / PROGRAMS / folder_name(record_id)
        files = tuple(_files(kept))
        shutil.rmtree(kept, ignore_errors=True)
        return self._sent.lines.pop(record_id, None), files


def _files(folder: Path) -> list[tuple[str, bytes]]:
    """Relative path and content of each file; they were capped when they were kept."""
    return [
        (str(file.relative_to(folder)), file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    ]


def write_program(out: Path, record_id: str, files: SentFiles) -> None:
    """Writes the files of a program's folder into the run folder; an earlier attempt's go.

    What cannot be written stands under `left_out` in program.json. Raises OSError if that cannot be
    written either.
    """
    folder = out / PROGRAMS / folder_name(record_id)
    shutil.rmtree(folder, ignore_errors=True)
    about: dict[str, Any] = {}
    left_out: list[str] = []
    for name, content in files:
        if name == ABOUT:
            with suppress(ValueError):  # the worker's disk was full
                about = json.loads(content)
            continue
        file = folder / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        except OSError:
            left_out.append(name.removeprefix("files/"))
    if about or left_out:
        about["left_out"] = [*about.get("left_out", ()), *left_out][:MOST_NAMED]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).write_text(about_text(about), encoding="utf-8")
