"""What is to be replayed, checked before anything starts: the options and the trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from agent.errors import AgentError, TaskError
from agent.loop.tasks import recorded_task
from agent.replay.tools import stand_ins
from agent.runs.manifest import command_line
from conversations.checks.shape import shape_findings
from conversations.checks.tokens import token_findings
from conversations.errors import RecordError
from conversations.rounds import sampled_places
from conversations.run.open_run import Run
from conversations.trajectory import Trajectory
from tools.base import ToolsError

RECORDED, LIVE = "recorded", "live"


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """The options of the command line.

    Without `from_turn` each trajectory is replayed from its prompt. `n` is the number of replays of
    each.
    """

    run: Path
    out: Path
    model: str = RECORDED
    tools: str = RECORDED
    config: Path | None = None
    overrides: Sequence[str] = ()
    tools_config: str | None = None
    trust_tools: bool = False
    ids: Sequence[str] = ()
    limit: int | None = None
    from_turn: int | None = None
    n: int = 1
    resume: bool = False
    force: bool = False
    argv: Sequence[str] = field(default=())

    @property
    def live_model(self) -> bool:
        return self.model == LIVE

    @property
    def live_tools(self) -> bool:
        return self.tools == LIVE

    @property
    def resume_command(self) -> str:
        """The command that resumes this replay."""
        return command_line(self.argv if self.resume else [*self.argv, "--resume"])

    def check(self) -> None:
        """Raises AgentError for options that contradict each other."""
        if self.from_turn is not None and not self.live_model:
            raise AgentError(
                "--from-turn samples fresh tokens, which the recorded model does not have; "
                "use --model live"
            )
        if self.n > 1 and not self.live_model:
            raise AgentError(
                f"--n {self.n}: with the recorded model all replays would be the same; "
                "use --model live"
            )
        if (self.tools_config or self.trust_tools) and not self.live_tools:
            raise AgentError(
                "--tools-config and --trust-tools are about live tools; use --tools live with them"
            )
        if self.run.resolve() == self.out.resolve():
            raise AgentError(
                f"--out {self.out} is the run itself; a replay goes into a folder of its own"
            )


def kept_turns(record: Trajectory, from_turn: int | None) -> int | None:
    """The number of turns that are kept: those before `from_turn`, else those that a fork had kept.

    None: nothing is kept, not even the prompt.
    """
    if from_turn is not None:
        return from_turn
    turn = (record.parent or {}).get("turn")
    return turn if isinstance(turn, int) and 0 <= turn <= len(record.turns) else None


@dataclass(frozen=True, slots=True)
class Choice:
    """The ids to replay, in order; whether they are all; why others are left out, in notes."""

    ids: list[str]
    is_all: bool
    notes: list[str]


def choose_trajectories(run: Run, request: ReplayRequest) -> Choice:
    """Reads every chosen trajectory once, so that a damaged one is known before anything runs.

    Raises RunFolderError if one does not match its hash, RecordError if its parts contradict each
    other.
    """
    asked = _asked(run, request)
    chosen, too_short, empty = [], [], []
    for trajectory_id in asked:
        record = checked(run, trajectory_id)
        if not record.messages:
            empty.append(trajectory_id)
        elif request.from_turn is not None and not _reaches(record, request.from_turn):
            too_short.append(trajectory_id)
        else:
            chosen.append(trajectory_id)
    notes = [
        f"{len(ids)} trajectories {what}: left out ({_some(ids)})"
        for ids, what in (
            (too_short, f"do not reach turn {request.from_turn}"),
            (empty, "failed before they had a message"),
        )
        if ids
    ]
    if not chosen:
        raise AgentError(
            f"{run.path}: nothing to replay: "
            + ("; ".join(notes) or "the run has no finished trajectories")
        )
    return Choice(chosen, len(chosen) == len(run), notes)


def checked(run: Run, trajectory_id: str) -> Trajectory:
    """A trajectory whose hash, form and spans are right. Raises RunFolderError or RecordError."""
    finding = next(shape_findings(run.record(trajectory_id)), None)
    record = run[trajectory_id] if finding is None else None
    finding = finding or (next(token_findings(record), None) if record else None)
    if finding or record is None:
        raise RecordError(
            f"{run.path}: trajectory {trajectory_id} cannot be replayed: "
            + (finding.what if finding else "it is damaged")
        )
    problem = next(_contradictions(record), None)
    try:
        stand_ins(record)
        recorded_task(record)
    except (ToolsError, TaskError) as error:
        problem = problem or str(error)
    if problem:
        raise RecordError(f"{run.path}: trajectory {trajectory_id} cannot be replayed: {problem}")
    return record


def _contradictions(record: Trajectory) -> chain[str]:
    sampled = len(sampled_places(record.messages))
    counts = (
        [f"{len(record.turns)} turns, {sampled} sampled messages"]
        if sampled != len(record.turns)
        else []
    )
    beyond = [
        f"{line.call_id} is of turn {line.turn}, there are {len(record.turns)}"
        for line in record.tool_calls
        if line.turn >= len(record.turns)
    ]
    return chain(counts, beyond)


def _asked(run: Run, request: ReplayRequest) -> list[str]:
    words = [
        word for given in request.ids for word in ([given] if given in run else given.split(","))
    ]
    for word in words:
        if word not in run:
            run.record(word)  # says what is there instead
    return (list(dict.fromkeys(words)) or list(run.ids))[: request.limit]


def _reaches(record: Trajectory, turn: int) -> bool:
    """Whether all tokens before `turn` are there: it was sampled, or all up to it was appended."""
    if turn < len(record.turns):
        return True
    end = record.turns[-1].end if record.turns else 0
    return turn == len(record.turns) and len(record.prompt_ids) + len(record.response_ids) > end


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
